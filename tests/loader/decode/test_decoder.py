"""One token through the CPU decoder: transformers' logits up to rounding, and the same bits with
any cache.
"""

import copy

import pytest
import torch
from decoding import (
    IDS,
    NAME,
    ROUNDING,
    logits,
    paths,
    prompted,
    rms_difference,
    token_by_token,
    transformers_code,
)
from inside import inside
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from loader.arithmetic import kernels
from loader.decode.cpu import CpuDecoder
from loader.decode.rotary_table import BLOCKS, POSITIONS, RotaryTable

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

FEW_SLOTS = [2, 0, 1, 8, 4, 1, 2, 3]
"""Of the example's layers: some without a slot, one with all experts."""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(converted, request):
    return loader.from_pretrained(
        converted("2bit"), kernels="native", dtype=request.param, ram_cache="1GiB"
    )


@pytest.fixture(scope="module")
def small(converted, model):
    """The same model with few experts in memory."""
    return loader.from_pretrained(
        converted("2bit"), kernels="native", dtype=model.dtype, slots=FEW_SLOTS
    )


@torch.no_grad()
def test_logits_differ_from_transformers_code_by_rounding_only(model):
    ours = token_by_token(model)
    with transformers_code(model):
        expected = token_by_token(model)
    assert ours[0].logits.dtype == expected[0].logits.dtype == model.dtype
    assert rms_difference(logits(ours), logits(expected)) < ROUNDING[model.dtype]


@torch.no_grad()
def test_bits_are_the_same_whichever_experts_are_in_memory(model, small):
    caches, ids = (DynamicCache(), DynamicCache()), IDS.repeat(1, 8)
    assert ids.shape[1] > 256
    whole, parts = (
        token_by_token(one, cache, ids) for one, cache in zip((model, small), caches, strict=True)
    )
    assert torch.equal(logits(whole), logits(parts))
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 3])
def test_bits_are_the_same_for_other_numbers_of_experts(converted, top_k):
    found = []
    for slots in ([8] * 8, [3, 1, 1, 8, 4, 1, 2, 3]):
        model = loader.from_pretrained(converted("2bit"), kernels="native", slots=slots)
        for layer in model.model.layers[1:]:
            layer.mlp.gate.top_k = top_k
        found.append(token_by_token(model))
        assert model.moe_stats().paths.decoder == IDS.shape[1] // 2
    assert torch.equal(*map(logits, found))


@torch.no_grad()
def test_the_output_is_the_object_that_transformers_makes(model):
    cache = DynamicCache()
    (ours,) = token_by_token(model, cache, IDS[:, :1])
    plain = MoeCausalLMOutputWithPast(logits=ours.logits, **{NAME: cache})
    assert type(ours) is type(plain) and list(ours.items()) == list(plain.items())
    assert vars(ours) == vars(plain)
    assert ours[0] is ours.logits and ours.to_tuple() == (ours.logits, cache)


@torch.no_grad()
def test_experts_are_asked_for_as_by_transformers_code(model, small):
    for one in (model, small):
        one.reset_moe_stats()
        token_by_token(one)
        ours = [layer.hits + layer.misses for layer in one.moe_stats().layers]
        one.reset_moe_stats()
        with transformers_code(one):
            token_by_token(one)
        assert ours == [layer.hits + layer.misses for layer in one.moe_stats().layers]


@torch.no_grad()
def test_experts_of_the_next_layer_are_guessed(small):
    small.reset_moe_stats()
    token_by_token(small)
    total = small.moe_stats().total
    assert total.guesses > total.useful_guesses > 0


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 16])
def test_a_packed_or_plain_head_gives_transformers_logits(example_folder, tmp_path, bits):
    convert_checkpoint(
        example_folder, tmp_path / "out", make_recipe("2bit", solver="hqq", head_bits=bits)
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = loader.from_pretrained(
            tmp_path / "out", kernels="native", dtype=dtype, ram_cache="1GiB"
        )
        ours = token_by_token(model)
        assert model.moe_stats().paths.decoder == len(ours)
        with transformers_code(model):
            assert rms_difference(logits(ours), logits(token_by_token(model))) < ROUNDING[dtype]


@torch.no_grad()
def test_a_mask_of_ones_and_the_next_position_change_nothing(model):
    def run(**options):
        return model(
            input_ids=IDS[:, 20:21], **{NAME: prompted(model, IDS[:, :20])}, **options
        ).logits

    position = torch.tensor([[20]])
    ones = torch.ones(1, 21, dtype=torch.int64)
    ours = run(attention_mask=ones, position_ids=position, logits_to_keep=1)
    assert torch.equal(ours, run())


@torch.no_grad()
def test_a_token_outside_of_the_vocabulary_raises_as_ever(model):
    with pytest.raises(IndexError):
        model(torch.tensor([[model.config.vocab_size]]), **{NAME: DynamicCache()}, use_cache=True)


@torch.no_grad()
def test_copies_of_a_cache_go_separate_ways(model):
    cache = DynamicCache()
    token_by_token(model, cache)
    other = copy.deepcopy(cache)
    tail = [token_by_token(model, cache), token_by_token(model, other)]
    assert torch.equal(logits(tail[0]), logits(tail[1]))
    assert torch.equal(cache.layers[0].keys, other.layers[0].keys)
    assert cache.layers[0].keys.data_ptr() != other.layers[0].keys.data_ptr()


@torch.no_grad()
def test_copies_of_a_model_give_the_same_bits_and_count_for_themselves(model):
    other = copy.deepcopy(model)
    before = model.moe_stats().paths
    assert torch.equal(logits(token_by_token(other)), logits(token_by_token(model)))
    assert other.moe_stats().paths.decoder == model.moe_stats().paths.decoder - before.decoder == 20
    assert type(other) is type(model)


@torch.no_grad()
def test_another_dtype_or_weight_after_loading_is_taken_up(converted):
    model = loader.from_pretrained(
        converted("2bit"), kernels="native", dtype=torch.bfloat16, ram_cache="1GiB"
    )
    token_by_token(model)
    embedding = model.model.embed_tokens
    for change in (
        lambda: model.to(torch.float32),
        lambda: model.model.norm.weight.data.mul_(2.0),
        lambda: setattr(embedding, "weight", nn.Parameter(embedding.weight.flip(0))),
    ):
        change()
        found = []
        assert paths(model, lambda found=found: found.append(token_by_token(model))) == (20, {})
        with transformers_code(model):
            expected = token_by_token(model)
        assert rms_difference(logits(found[0]), logits(expected)) < ROUNDING[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("slots", [[8] * 8, FEW_SLOTS], ids=["all", "few"])
def test_an_expert_that_cannot_be_read_leaves_the_cache_as_it_was(converted, monkeypatch, slots):
    model = loader.from_pretrained(converted("2bit"), kernels="native", slots=slots)
    cache, source = DynamicCache(), model.model.layers[0].mlp.experts.cache
    model(IDS[:, :1], **{NAME: cache}, use_cache=True)

    def failing(method):
        def fails(self, layer, experts):
            if layer == len(model.model.layers) - 1:
                raise OSError("gone")
            return method(self, layer, experts)

        return fails

    with monkeypatch.context() as patch:
        for name in ("lease", "used_again"):
            patch.setattr(type(source), name, failing(getattr(type(source), name)))
        with pytest.raises(OSError, match="gone"):
            model(IDS[:, 1:2], **{NAME: cache}, use_cache=True)
    assert [layer.get_seq_length() for layer in cache.layers] == [1] * len(cache.layers)
    again = model(IDS[:, 1:2], **{NAME: cache}, use_cache=True).logits
    assert torch.equal(again[0, 0], logits(token_by_token(model, DynamicCache(), IDS[:, :2]))[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_rows_are_those_of_the_model(model, dtype):
    rotary = model.model.rotary_emb
    table = RotaryTable(rotary, dtype)
    for position in [
        *range(0, 2 * POSITIONS),
        4097,
        31999,
        *range(100000, 100000 + BLOCKS * POSITIONS, POSITIONS - 1),
    ]:
        cos, sin, row = table.find(position)
        expected = rotary(torch.empty(1, dtype=dtype), torch.tensor([[position]]))
        assert torch.equal(cos[:, row], expected[0][:, 0]) and torch.equal(
            sin[:, row], expected[1][:, 0]
        )


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "lookup"])
def test_generate_gives_the_same_tokens_whichever_experts_are_in_memory(model, small, options):
    ours, theirs = (
        one.generate(IDS, max_new_tokens=24, do_sample=False, pad_token_id=2, **options)
        for one in (model, small)
    )
    assert torch.equal(ours, theirs)


def test_a_table_of_addresses_is_a_tokens_own(converted):
    """Addresses of a lease must not outlive it: a later token would read another expert's bytes."""
    model = loader.from_pretrained(converted("2bit"), kernels="native", slots=FEW_SLOTS)
    made, init = [], CpuDecoder.__init__
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            CpuDecoder, "__init__", lambda self, *args: made.append(self) or init(self, *args)
        )
        token_by_token(model)
    (decoder,) = made
    known = {number // 8 for number, address in enumerate(inside(decoder, "blobs")) if address}
    assert known == {3}
