"""The cache that grows in place gives what transformers' DynamicCache gives."""

import copy
from contextlib import nullcontext

import pytest
import torch
from cache_changes import CACHE_CHANGES
from decoding import transformers_code
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import loader
from loader.arithmetic import kernels
from loader.hf import served_model
from loader.hf.growing_cache import GrowingLayer, growing_layer

PROMPT = "So Jonah arose, and went to Nineveh, according to"


def states(positions, seed, batch=2, **options):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, 3, positions, 4, generator=generator, **options) for _ in range(2)
    )


def both():
    return GrowingLayer(), DynamicLayer()


def agree(ours, plain):
    return all(torch.equal(a, b) for a, b in ((ours.keys, plain.keys), (ours.values, plain.values)))


def append(layers, lengths, batch=2, seed=0):
    for number, length in enumerate(lengths):
        results = [layer.update(*states(length, seed + number, batch)) for layer in layers]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_appending_equals_concatenating():
    ours, plain = both()
    append((ours, plain), [5, 1, 1, 300, 1, 7, 600, 1])
    assert agree(ours, plain)
    assert ours.get_seq_length() == plain.get_seq_length() == 916


def test_a_token_stays_in_place_until_the_memory_is_full():
    ours, _ = both()
    ours.update(*states(100, 0))
    # The views keep the old memory alive: a freed address may be allocated again.
    views = []
    for number in range(500):
        ours.update(*states(1, number))
        views.append(ours.keys)
    assert len({view.data_ptr() for view in views}) == 3


@pytest.mark.parametrize("change", CACHE_CHANGES.values(), ids=CACHE_CHANGES)
def test_changes_of_the_batch_and_crops_are_kept(change):
    layers = both()
    append(layers, [6, 1])
    for layer in layers:
        change(layer)
    assert agree(*layers)
    append(layers, [1, 2, 1], batch=layers[1].keys.shape[0], seed=9)
    assert agree(*layers)
    for layer in layers:
        change(layer)
    append(layers, [1], batch=layers[1].keys.shape[0], seed=5)
    assert agree(*layers)


def test_a_deep_copy_is_independent():
    ours, plain = both()
    append((ours, plain), [6])
    other = copy.deepcopy(ours)
    ours.update(*states(1, 5))
    append((other, plain), [1, 1], seed=7)
    assert agree(other, plain)


def test_reset_empties():
    layers = both()
    append(layers, [6])
    for layer in layers:
        layer.reset()
    # 5.0 zeroes and keeps the length, later versions drop the tensors.
    assert layers[0].get_seq_length() == layers[1].get_seq_length()
    append(layers, [3])


def test_memory_of_inference_mode_may_go_on_outside():
    ours, plain = both()
    with torch.inference_mode():
        append((ours, plain), [6, 1])
    append((ours, plain), [1, 1], seed=4)
    with torch.inference_mode():
        append((ours, plain), [1], seed=3)
    assert agree(ours, plain)


def test_gradients_flow_through_the_cache():
    results = []
    for layer in both():
        parts = [states(length, length, requires_grad=True) for length in (3, 1, 1)]
        total = sum(
            (keys * values).sum() for keys, values in (layer.update(*part) for part in parts)
        )
        total.backward()
        results.append([tensor.grad for part in parts for tensor in part])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_plain_layers_of_plain_caches_are_replaced():
    cache = DynamicCache()
    assert type(growing_layer(cache, 2)) is GrowingLayer
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
    sliding = DynamicCache()
    sliding.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    assert growing_layer(sliding, 0) is None

    class Own(DynamicCache):
        pass

    assert growing_layer(Own(), 0) is None
    assert growing_layer(None, 0) is None


@pytest.fixture(scope="module", params=["torch", "native"])
def model(converted, request):
    if request.param == "native" and not kernels.available():
        pytest.skip("not built")
    return loader.from_pretrained(converted("2bit"), kernels=request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def batch(converted):
    tokenizer = loader.load_tokenizer(converted("2bit"))
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    return tokenizer([PROMPT, "def f(x):", "The"], return_tensors="pt", padding=True)


def with_and_without(model, monkeypatch, run):
    """Return the results of `run` with the growing cache and with transformers' own cache.

    transformers' code computes single tokens in both.
    """
    with transformers_code(model):
        ours = run()
        monkeypatch.setattr(served_model, "growing_layers", lambda *_: None)
        return ours, run()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ],
    ids=["greedy", "beams", "sequences", "lookup"],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_generate_gives_the_tokens_of_the_dynamic_cache(model, batch, monkeypatch, options, rows):
    if rows > 1 and "prompt_lookup_num_tokens" in options:
        pytest.skip("transformers: assisted generation takes one sequence")
    arguments = {name: batch[name][:rows] for name in ("input_ids", "attention_mask")}
    ours, plain = with_and_without(
        model,
        monkeypatch,
        lambda: model.generate(**arguments, max_new_tokens=24, pad_token_id=2, **options),
    )
    assert torch.equal(ours, plain)


def test_generate_may_go_on_from_its_cache(model, batch, monkeypatch):
    def run():
        ids, past = batch["input_ids"][:1], DynamicCache()
        for _ in range(3):
            output = model.generate(
                ids,
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=2,
                return_dict_in_generate=True,
                past_key_values=past,
            )
            ids, past = output.sequences, output.past_key_values
        return ids

    ours, plain = with_and_without(model, monkeypatch, run)
    assert torch.equal(ours, plain)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("code", [transformers_code, nullcontext], ids=["transformers", "decoder"])
def test_the_whole_prompt_at_once_and_token_by_token_agree(model, batch, code):
    ids, cache, steps = batch["input_ids"][:1], DynamicCache(), []
    with torch.inference_mode(), code(model):
        whole = model(ids, use_cache=False).logits
        for position in range(ids.shape[1]):
            cache_of = {"past_key_values": cache}
            steps.append(model(ids[:, position : position + 1], use_cache=True, **cache_of).logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < 0.05 * whole.std()
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
