"""Native attention of one token gives the result of transformers' attention."""

import copy

import pytest
import torch
from native_attention import NativeAttention
from random_weights import PACKING, random_tiles
from transformers import DynamicCache, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralRotaryEmbedding

from formats.tiles import dequantize, unpack
from loader.arithmetic import kernels
from loader.arithmetic.kernels import PackedMatrix
from loader.arithmetic.native_backend import NativeBackend
from loader.decode.weights import AttentionWeights
from loader.hf.eight_bit_layer import EightBitLayer
from loader.hf.growing_cache import GrowingLayer, growing_layer
from loader.hf.modules.packed_modules import PackedLinear

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

ATTENTION_PROJECTIONS = "q_proj", "k_proj", "v_proj", "o_proj"


class Ours:
    """transformers' attention over packed projections; single tokens take the native attention."""

    def __init__(self, packed, dtype):
        self.packed, self.config = packed, packed.config
        matrices = (getattr(packed, name) for name in ATTENTION_PROJECTIONS)
        weights = AttentionWeights(
            *(PackedMatrix(m.packed, m.packing.name, m.out_features) for m in matrices)
        )
        self._native = NativeAttention(
            weights, packed.config.hidden_size, packed.head_dim, packed.scaling, dtype
        )

    def __call__(self, x, cos_sin, mask, cache):
        if mask is not None:
            return self.packed(x, cos_sin, mask, cache)
        return self._native.append(x, *cos_sin, growing_layer(cache, 0)), None


def attentions(heads, kv_heads, dim, dtype, hidden=192):
    """Our attention over packed weights, and transformers' over the same dequantized ones."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    packed, plain = MixtralAttention(config, 0), MixtralAttention(config, 0)
    for name in ATTENTION_PROJECTIONS:
        linear = getattr(plain, name)
        rows, columns = linear.weight.shape
        ours = PackedLinear(PACKING, rows, columns, NativeBackend())
        ours.packed = random_tiles(rows, columns)
        linear.weight.data = dequantize(
            unpack(ours.packed, PACKING, rows, columns), PACKING.group_size
        )
        setattr(packed, name, ours)
    return Ours(packed.eval(), dtype), plain.eval(), MixtralRotaryEmbedding(config), dtype


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
        mask = (
            None
            if length == 1
            else torch.ones(length, position + length, dtype=torch.bool).tril(position)
        )
        # By position: the cache's name differs between versions of transformers.
        outputs.append(module(x, cos_sin, mask, cache)[0])
        position += length
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("isa", kernels.supported_isas() if kernels.available() else [])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 32), (8, 8, 16), (6, 1, 64), (9, 3, 128), (4, 1, 128)]
)
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
    assert (cache.layers[0].keys - wanted_cache.layers[0].keys).norm() < 0.02 * wanted_cache.layers[
        0
    ].keys.norm()
    assert (
        cache.layers[0].values - wanted_cache.layers[0].values
    ).norm() < 0.02 * want.norm() + 0.02 * (wanted_cache.layers[0].values.norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("prompt", [5, 64, 511, 512, 1500])
def test_attention_over_a_prompt_differs_by_rounding_only(dtype, limit, prompt):
    ours, _, rotary, _ = attentions(8, 2, 64, dtype)
    got, _ = steps(ours, rotary, dtype, [prompt, 1, 1, 1])
    want, _ = steps(ours.packed, rotary, dtype, [prompt, 1, 1, 1])
    assert torch.equal(got[:, :prompt], want[:, :prompt])
    assert (got - want)[:, prompt:].float().norm() < limit * want[:, prompt:].float().norm()


def packed_weights(hidden, heads, kv_heads, dim):
    """Random attention weights."""
    shapes = (heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * dim, hidden)
    return AttentionWeights(
        *(
            PackedMatrix(random_tiles(rows, columns), PACKING.name, rows)
            for rows, columns in (*shapes, (hidden, heads * dim))
        )
    )


def random_cache(kind, length, layer=GrowingLayer):
    """A KV cache layer of random values."""
    heads, dim, dtype, _ = kind
    cache = layer()
    if length:
        cache.update(*(torch.randn(1, heads, length, dim).to(dtype) for _ in range(2)))
    return cache


def token(hidden, dim, dtype):
    """Random activations, cos and sin of one token."""
    return [torch.randn(1, 1, width).to(dtype) for width in (hidden, dim, dim)]


def in_float64(weights, x, cos, sin, cache, heads):
    """Attention over a cache that ends with x's own key and value, in float64 between q and o."""
    keys, values = (part[0].double() for part in (cache.keys, cache.values))
    kv_heads, _, dim = keys.shape
    q = kernels.linear(x[0].float(), weights.q.tiles, weights.q.packing, weights.q.rows)
    q = q.double().view(heads, dim)
    turned = torch.cat((-q[:, dim // 2 :], q[:, : dim // 2]), 1)
    q = (q * cos[0] + turned * sin[0]).view(kv_heads, -1, dim)
    mixed = torch.softmax(q @ keys.mT * dim**-0.5, -1) @ values
    mixed = mixed.reshape(1, -1).float()
    return kernels.linear(mixed, weights.o.tiles, weights.o.packing, weights.o.rows)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 2047, 2048, 5000])
@torch.inference_mode()
def test_attention_over_a_long_cache_is_that_of_float64(length, dtype):
    torch.manual_seed(length)
    heads, dim, hidden = 8, 32, 64
    weights = packed_weights(hidden, heads, 2, dim)
    native = NativeAttention(weights, hidden, dim, dim**-0.5, dtype)
    cache = random_cache(native.kind, length)
    x, cos, sin = token(hidden, dim, dtype)
    got = native.append(x, cos, sin, cache)[0, 0]
    expected = in_float64(weights, x, cos, sin, cache, heads)
    # In bf16 the output is rounded. With these seeds no int8 step of o's input differs (1e-3).
    limit = 1e-5 if dtype is torch.float32 else 4e-3
    assert (got - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("layer", [GrowingLayer, EightBitLayer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [3, 600, 5000])
@torch.inference_mode()
def test_the_bits_are_the_same_on_any_number_of_threads_and_any_instruction_set(
    length, dtype, layer
):
    torch.manual_seed(0)
    dim, hidden = 64, 192
    native = NativeAttention(packed_weights(hidden, 10, 2, dim), hidden, dim, 0.1, dtype)
    cache, inputs = random_cache(native.kind, length, layer), token(hidden, dim, dtype)
    results = []
    try:
        for threads in (1, 2, 3, 16):
            for isa in kernels.supported_isas():
                kernels.set_threads(threads)
                kernels.set_isa(isa)
                own = copy.deepcopy(cache)
                out = native.append(*inputs, own)
                results.append(torch.cat((out.flatten(), own.keys.flatten(), own.values.flatten())))
    finally:
        kernels.set_threads(0)
        kernels.set_isa("auto")
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("dtype", "exact", "rounded"), [(torch.float32, 5e-4, 0.02), (torch.bfloat16, 4e-3, 0.02)]
)
@pytest.mark.parametrize("length", [0, 63, 2047, 5000])
@torch.inference_mode()
def test_attention_over_8_bits_is_that_of_float64_over_its_values(length, dtype, exact, rounded):
    """It is also near the attention over 16 bits (docs/numerics.md states both limits)."""
    torch.manual_seed(length)
    heads, dim, hidden = 8, 80, 64
    weights = packed_weights(hidden, heads, 2, dim)
    native = NativeAttention(weights, hidden, dim, dim**-0.5, dtype)
    plain = random_cache(native.kind, length)
    cache = EightBitLayer.from_layer(plain)
    x, cos, sin = token(hidden, dim, dtype)
    got = native.append(x, cos, sin, cache)[0, 0]
    wide = GrowingLayer()
    wide.update(*cache.dequantized(torch.float32))
    expected = in_float64(weights, x, cos, sin, wide, heads)
    assert (got - expected).norm() < exact * expected.norm()
    native.append(x, cos, sin, plain)
    expected = in_float64(weights, x, cos, sin, plain, heads)
    assert (got - expected).norm() < rounded * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 16), (1, 96), (3, 128)])
@torch.inference_mode()
def test_a_token_appends_the_8_bits_that_torch_makes_of_the_plain_cache(kv_heads, dim, dtype):
    torch.manual_seed(0)
    hidden, heads = 64, 2 * kv_heads
    native = NativeAttention(packed_weights(hidden, heads, kv_heads, dim), hidden, dim, 0.1, dtype)
    plain, ours = GrowingLayer(), EightBitLayer()
    for _ in range(70):
        inputs = token(hidden, dim, dtype)
        native.append(*inputs, plain)
        native.append(*inputs, ours)
    quantized = EightBitLayer.from_layer(plain)
    for got, expected in zip(
        ours.dequantized(torch.float32), quantized.dequantized(torch.float32), strict=True
    ):
        assert torch.equal(got, expected)


@torch.inference_mode()
def test_a_value_that_is_not_finite_makes_the_outputs_of_its_heads_nan():
    torch.manual_seed(0)
    hidden, dim = 64, 64
    native = NativeAttention(packed_weights(hidden, 2, 1, dim), hidden, dim, 0.1, torch.float32)
    for part in range(2):
        for value in (torch.nan, torch.inf):
            rows = [torch.randn(1, 1, 40, dim) for _ in range(2)]
            rows[part][0, 0, 17, 3] = value
            cache = EightBitLayer()
            cache.update(*rows)
            for isa in kernels.supported_isas():
                kernels.set_isa(isa)
                out = native.append(*token(hidden, dim, torch.float32), cache)
                assert out.isnan().all()
            kernels.set_isa("auto")
