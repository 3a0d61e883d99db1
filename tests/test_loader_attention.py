"""One token through the native attention step gives what transformers' attention gives."""

import pytest
import torch
from transformers import DynamicCache, MixtralConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralRotaryEmbedding

from formats.packing import dequantize, packing_named, unpack
from loader import kernels
from loader.attention import PackedAttention
from loader.backend import TorchBackend
from loader.modules import PackedLinear

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

PACKING = packing_named("tile32-q4-g64-s8")


def random_tiles(rows, columns):
    tiles = torch.randint(0, 256, (rows // 32, PACKING.tile_bytes(columns)), dtype=torch.uint8)
    tiles[:, :128] = torch.full((64,), 2e-5, dtype=torch.float16).view(torch.uint8)
    return tiles


def attentions(heads, kv_heads, dim, dtype, hidden=192):
    """Our attention over packed weights, and transformers' over the same dequantized ones."""
    from loader.native_backend import NativeBackend

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    ours, plain = PackedAttention(config, 0), MixtralAttention(config, 0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(plain, name)
        rows, columns = linear.weight.shape
        packed = PackedLinear(PACKING, rows, columns, NativeBackend())
        packed.packed = random_tiles(rows, columns)
        linear.weight.data = dequantize(unpack(packed.packed, PACKING, rows, columns), PACKING.group_size)
        setattr(ours, name, packed)
    return ours.eval(), plain.eval(), MixtralRotaryEmbedding(config), dtype


def exact(module):
    """The same module with torch's arithmetic."""
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
        linear._backend = TorchBackend()
    return module


@torch.inference_mode()
def steps(module, rotary, dtype, lengths):
    """Outputs for a prompt of lengths[0] tokens and the single tokens after it."""
    torch.manual_seed(1)
    cache, position, outputs = DynamicCache(), 0, []
    width = module.config.hidden_size
    for length in lengths:
        x = torch.randn(1, length, width).to(dtype)
        places = torch.arange(position, position + length)[None]
        cos_sin = rotary(x, places)
        mask = None if length == 1 else torch.ones(length, position + length, dtype=torch.bool).tril(position)
        # By position: the cache's name differs between versions of transformers.
        outputs.append(module(x, cos_sin, mask, cache)[0])
        position += length
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("isa", kernels.supported_isas() if kernels.available() else [])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (8, 8, 16), (6, 1, 64), (9, 3, 128), (4, 1, 128)])
def test_a_token_gets_what_transformers_attention_gives(isa, heads, kv_heads, dim):
    ours, plain, rotary, dtype = attentions(heads, kv_heads, dim, torch.float32)
    kernels.set_isa(isa)
    try:
        lengths = [1] * 70 + [1]
        got, cache = steps(ours, rotary, dtype, lengths)
    finally:
        kernels.set_isa("auto")
    want, wanted_cache = steps(plain, rotary, dtype, lengths)
    # The difference is the rounding of activations to int8 in q, k, v and o.
    assert (got - want).norm() < 0.02 * want.norm()
    assert (cache.layers[0].keys - wanted_cache.layers[0].keys).norm() < 0.02 * wanted_cache.layers[0].keys.norm()
    assert (cache.layers[0].values - wanted_cache.layers[0].values).norm() < 0.02 * want.norm() + 0.02 * (
        wanted_cache.layers[0].values.norm()
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("prompt", [5, 64, 511, 512, 1500])
def test_attention_over_a_prompt_differs_by_rounding_only(monkeypatch, dtype, limit, prompt):
    ours, _, rotary, _ = attentions(8, 2, 64, dtype)
    got, _ = steps(ours, rotary, dtype, [prompt, 1, 1, 1])
    monkeypatch.setattr(PackedAttention, "is_plain", lambda self: False)
    want, _ = steps(ours, rotary, dtype, [prompt, 1, 1, 1])
    assert torch.equal(got[:, :prompt], want[:, :prompt])
    assert (got - want)[:, prompt:].float().norm() < limit * want[:, prompt:].float().norm()


def test_the_bits_are_the_same_on_any_number_of_threads_and_any_instruction_set():
    ours, _, rotary, dtype = attentions(8, 2, 64, torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        for isa in kernels.supported_isas():
            kernels.set_threads(threads)
            kernels.set_isa(isa)
            results.append(steps(ours, rotary, dtype, [1] * 3)[0])
    kernels.set_threads(0)
    kernels.set_isa("auto")
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_mask_goes_to_transformers_code(monkeypatch):
    ours, _, rotary, _ = attentions(4, 2, 32, torch.float32)
    monkeypatch.setattr(PackedAttention, "native_step", None)
    x = torch.randn(1, 1, 192)
    with torch.inference_mode():
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        ours(x, rotary(x, torch.zeros(1, 1)), mask, DynamicCache())


def test_gradients_go_to_transformers_code(monkeypatch):
    ours, _, rotary, _ = attentions(4, 2, 32, torch.float32)
    exact(ours)
    monkeypatch.setattr(PackedAttention, "native_step", None)
    x = torch.randn(1, 1, 192, requires_grad=True)
    out, _ = ours(x, rotary(x, torch.zeros(1, 1)), None, DynamicCache())
    out.sum().backward()
    assert x.grad is not None


def test_other_caches_stay_as_they_are(monkeypatch):
    ours, _, rotary, _ = attentions(4, 2, 32, torch.float32)
    monkeypatch.setattr(PackedAttention, "native_step", None)
    x = torch.randn(1, 1, 192)
    cache = StaticCache(config=ours.config, max_cache_len=8)
    with torch.inference_mode():
        # transformers 5.0 wants the position as well.
        ours(x, rotary(x, torch.zeros(1, 1)), None, cache, cache_position=torch.zeros(1, dtype=torch.int64))
    assert type(cache.layers[0]) is StaticLayer
