"""The option kv_bits=8: both paths use one KV cache in 8 bits, or the load is refused."""

import copy

import pytest
import torch
from decoding import (
    IDS,
    NAME,
    ROUNDING,
    logits,
    paths,
    rms_difference,
    token_by_token,
    transformers_code,
)
from transformers import DynamicCache, StaticCache

import loader
from formats.errors import MoeConvertError, RecipeError
from loader.arithmetic import kernels
from loader.decode.kv_bits_check import check_8bit_cache
from loader.evaluation.perplexity import measure_windows
from loader.hf.eight_bit_layer import EightBitLayer

needs_native = pytest.mark.skipif(not kernels.available(), reason="not built")


@pytest.fixture(scope="module")
def folder(converted):
    return converted("2bit")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(folder, request):
    return loader.from_pretrained(folder, kv_bits=8, dtype=request.param)


@pytest.fixture(scope="module")
def plain(folder):
    return loader.from_pretrained(folder, dtype=torch.float32)


def kinds(cache):
    return {type(layer) for layer in cache.layers}


@needs_native
@torch.inference_mode()
def test_decoder_and_transformers_code_agree(model):
    def decode():
        return logits(token_by_token(model))

    assert paths(model, decode) == (20, {})
    with transformers_code(model):
        expected = decode()
    assert rms_difference(decode(), expected) < ROUNDING[model.dtype]


@needs_native
@torch.inference_mode()
def test_paths_may_take_turns_over_one_cache(model):
    cache, steps = DynamicCache(), []
    for number, token in enumerate(IDS.split(1, 1)):
        if number % 2:
            steps += token_by_token(model, cache, token)
        else:
            with transformers_code(model):
                steps += token_by_token(model, cache, token)
    assert kinds(cache) == {EightBitLayer}
    whole = model(IDS).logits
    assert (
        rms_difference(torch.cat([step.logits for step in steps], 1), whole)
        < 2 * ROUNDING[model.dtype]
    )


@torch.inference_mode()
def test_logits_are_near_those_of_16_bits(folder, plain):
    ours = loader.from_pretrained(folder, kv_bits=8, dtype=torch.float32)
    difference = rms_difference(logits(token_by_token(ours)), logits(token_by_token(plain)))
    assert 0 < difference < 0.05


@pytest.mark.parametrize("backend", ["torch", "native"])
@torch.inference_mode()
def test_the_cache_has_8_bits_whoever_makes_it(folder, backend):
    if backend == "native" and not kernels.available():
        pytest.skip("not built")
    model = loader.from_pretrained(folder, kv_bits=8, kernels=backend)
    own = DynamicCache()
    caches = [model(IDS)[NAME], model(IDS, None, None, None)[NAME], model(IDS, **{NAME: own})[NAME]]
    made = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=2)
    caches.append(made[NAME])
    assert all(kinds(cache) == {EightBitLayer} for cache in caches)
    assert caches[2] is own
    assert getattr(model(IDS, use_cache=False), NAME) is None


@torch.inference_mode()
def test_a_cache_of_16_bits_is_quantized(model, plain):
    cache = plain(IDS[:, :20])[NAME]
    keys = cache.layers[0].keys.clone()
    model(IDS[:, 20:], **{NAME: cache})
    assert kinds(cache) == {EightBitLayer}
    difference = (cache.layers[0].keys[:, :, :20] - keys).abs().max()
    assert 0 < difference < 0.01 * keys.abs().max()


@torch.inference_mode()
def test_another_kind_of_cache_is_refused(model):
    class Own(DynamicCache):
        pass

    for cache in (Own(), StaticCache(config=model.config, max_cache_len=64)):
        with pytest.raises(MoeConvertError, match=f"kv_bits.*{type(cache).__name__}"):
            model(IDS, **{NAME: cache})


@torch.inference_mode()
def test_a_failed_pass_leaves_the_cache_as_it_was(model):
    cache = model(IDS[:, :20])[NAME]
    before = [layer.keys for layer in cache.layers]

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[-1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(IDS[:, 20:], **{NAME: cache})
    handle.remove()
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["beams", "lookup", "sequences"],
)
def test_generate_works_with_each_strategy(model, options):
    made = model.generate(
        IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2, **options
    )
    length = IDS.shape[1] + 12
    # transformers before 5.24 may accept one looked-up token too many.
    assert made.shape[0] == options.get("num_return_sequences", 1)
    assert length <= made.shape[1] <= length + 1
    if "num_beams" not in options:
        greedy = model.generate(
            IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2
        )
        assert (greedy == made[:, :length]).float().mean() > 0.9


def test_perplexity_is_measured_through_the_cache(folder, plain):
    ours = loader.from_pretrained(folder, kv_bits=8, dtype=torch.float32)
    texts = [("text", IDS)]
    nlls = [measure_windows(m, texts).overall.nll for m in (ours, plain)]
    assert nlls[0] != nlls[1]
    assert nlls[0] == pytest.approx(nlls[1], rel=0.02)


def test_stats_name_the_bits(model, plain):
    assert model.moe_stats().as_dict()["kv_bits"] == model.kv_bits == 8
    assert plain.moe_stats().as_dict()["kv_bits"] == plain.kv_bits == 16
    assert copy.deepcopy(model).kv_bits == 8


def test_other_numbers_of_bits_are_refused(folder):
    for bits in (4, "8", None):
        with pytest.raises(RecipeError, match=r"kv_bits.*known are 8, 16"):
            loader.from_pretrained(folder, kv_bits=bits)
    with pytest.raises(RecipeError, match="kv_bits"):
        loader.defaults(kv_bits=4)
    with loader.defaults(kv_bits=8):
        assert loader.from_pretrained(folder).kv_bits == 8


def test_models_without_kernels_are_refused_by_name(folder):
    from formats.artifact import Artifact

    artifact = Artifact.open(folder)
    shape, config = artifact.architecture, artifact.config
    check_8bit_cache(shape, config, [])
    with pytest.raises(RecipeError, match="GPU"):
        check_8bit_cache(shape, config, ["cuda:0"])
    with pytest.raises(RecipeError, match="sliding_window is 4096"):
        check_8bit_cache(shape, {**config, "sliding_window": 4096}, [])
    with pytest.raises(RecipeError, match="head_dim is 24"):
        check_8bit_cache(changed(shape, head_dim=24), config, [])
    with pytest.raises(RecipeError, match=r"qwen3_moe has no kernel.*mixtral"):
        check_8bit_cache(changed(shape, model_type="qwen3_moe"), config, [])


def test_a_repository_is_refused_before_its_weights_are_downloaded(hub, folder, monkeypatch):
    hub.add("me/tiny-2bit", folder)
    # As for a model type without a decoder.
    monkeypatch.setattr("loader.decode.kv_bits_check.SPECS", {})
    with pytest.raises(RecipeError, match="kv_bits"):
        loader.from_pretrained("me/tiny-2bit", kv_bits=8)
    assert not hub.ranges(".safetensors")
    monkeypatch.undo()


def test_a_gpu_is_refused(folder, monkeypatch):
    monkeypatch.setattr("loader.model.choose_devices", lambda *_: ["cuda:0"])
    with pytest.raises(RecipeError, match="GPU") as refused:
        loader.from_pretrained(folder, kv_bits=8)
    assert "--device cpu" in str(refused.value)


@torch.inference_mode()
def test_a_repository_loads_with_8_bits(hub, folder):
    hub.add("me/tiny-2bit", folder)
    assert loader.from_pretrained("me/tiny-2bit", kv_bits=8).kv_bits == 8


def changed(struct, **fields):
    import msgspec

    return msgspec.structs.replace(struct, **fields)
