"""The output head: packed by the recipe, or bf16 by the native call."""

from pathlib import Path

import torch

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from loader.hf.modules.head import NativeHead
from loader.hf.modules.packed_modules import PackedLinear


def test_packed_head_gives_nearly_the_logits_of_the_plain_one(
    example_folder: Path, tmp_path: Path
) -> None:
    ids = torch.tensor([[1, 80, 90, 100, 110, 120]])
    logits = []
    for bits in (16, 4):
        convert_checkpoint(
            example_folder, tmp_path / str(bits), make_recipe("4bit", solver="hqq", head_bits=bits)
        )
        model = loader.from_pretrained(tmp_path / str(bits), dtype=torch.float32)
        assert isinstance(model.lm_head, PackedLinear) == (bits == 4)
        with torch.inference_mode():
            logits.append(model(ids).logits)
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.15


@torch.no_grad()
def test_a_bias_is_added_to_the_product_of_few_tokens() -> None:
    head = NativeHead(64, 32).bfloat16()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.nn.functional.linear(x, head.weight, head.bias)
    torch.testing.assert_close(head(x), expected)
