"""The packed linear layer as an nn.Linear: its weight has no values, and it may have a bias."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import paths, token_by_token
from loaded_models import load
from random_weights import random_tiles

from formats.errors import MoeConvertError
from formats.packing import packing_named
from loader.arithmetic import kernels
from loader.arithmetic.backend import TorchBackend, choose_backend
from loader.hf.modules.packed_modules import PackedLinear


def packed_linear(**options: Any) -> PackedLinear:
    linear = PackedLinear(packing_named("tile32-q4-g64-s8"), 64, 96, TorchBackend(), **options)
    linear.packed = random_tiles(64, 96)
    return linear


def test_a_packed_linear_is_a_linear_layer_without_parameters() -> None:
    linear = packed_linear()
    assert isinstance(linear, torch.nn.Linear)
    assert not list(linear.parameters()) and list(linear.state_dict()) == ["packed"]
    assert (linear.weight.shape, linear.weight.dtype, linear.weight.device) == (
        (64, 96),
        torch.float32,
        torch.device("cpu"),
    )
    assert repr(linear) == (
        "PackedLinear(in_features=96, out_features=64, packing=tile32-q4-g64-s8, bias=False)"
    )
    packed = linear.packed.clone()
    assert torch.equal(linear.half().to(torch.bfloat16).packed, packed)


@pytest.mark.parametrize(
    "use", [lambda w: w + 1, lambda w: w.data.add_(1), lambda w: w.clone(), lambda w: w.sum()]
)
def test_values_of_packed_weights_are_refused(use: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(MoeConvertError, match="packed") as raised:
        use(packed_linear().weight)
    assert "unmerged" in str(raised.value.hint)


def test_a_packed_linear_adds_its_bias_which_can_be_trained() -> None:
    linear = packed_linear(bias=True)
    assert list(linear.state_dict()) == ["bias", "packed"]
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(2, 5, 96)
    without = packed_linear()
    without.packed = linear.packed
    torch.testing.assert_close(linear(x), without(x) + linear.bias)
    linear(x).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((64,), 10.0))


@pytest.mark.skipif(not kernels.available(), reason="not built")
def test_attention_with_a_bias_does_not_take_the_decoder(converted: Callable[[str], Path]) -> None:
    model = load(converted("2bit"), kernels="native")
    attention = model.model.layers[0].self_attn
    old = attention.q_proj
    attention.q_proj = PackedLinear(
        old.packing, old.out_features, old.in_features, choose_backend("native"), bias=True
    )
    attention.q_proj.packed = old.packed
    torch.nn.init.zeros_(attention.q_proj.bias)
    model.eval()
    with torch.no_grad():
        decoded, reasons = paths(model, lambda: token_by_token(model))
    assert (decoded, reasons) == (0, {"weights": 20})
