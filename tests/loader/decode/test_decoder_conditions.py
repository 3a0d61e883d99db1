"""Single tokens with other positions, windows, dtypes and caches: transformers' results on every
path.
"""

import json
import shutil

import pytest
import torch
from changed_configs import CONFIGS, with_config
from decoding import transformers_code
from make_checkpoint import SHAPES, make_checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from loader.arithmetic import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="not built")

IDS = torch.arange(7, 47)[None]
POSITIONS = [
    "window", "linear", "dynamic", "yarn", "llama3", "longrope", "beyond the longest position",
    "rope_parameters",
]  # fmt: skip


def token_by_token(model, cache=None, begin=8, end=40):
    """Return logits of single tokens after a prompt of eight, or from `begin` on over `cache`."""
    if begin == 8:
        output = model(IDS[:, :8], past_key_values=cache, use_cache=True)
        cache = output.past_key_values if cache is None else cache
    steps = [
        model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True) for i in range(begin, end)
    ]
    return torch.cat([step.logits for step in steps], 1)


def converted_with_config(folder, out, changes):
    """A converted folder of the same weights, as from a source whose config.json has `changes`;
    fields set to None are removed. The index records what config.json says.
    """
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (out / "config.json").write_text(json.dumps(config))
    index = json.loads((out / "moe_index.json").read_text())
    index["config"]["sliding_window"] = config.get("sliding_window")
    (out / "moe_index.json").write_text(json.dumps(index))
    return out


@pytest.fixture(scope="module")
def bfloat16_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "mini"
    make_checkpoint(folder, SHAPES["mini"], 2)
    return folder


@pytest.fixture(scope="module")
def unchanged_weights(bfloat16_source, tmp_path_factory):
    """The same, converted to 16 bits: its weights are the source's."""
    folder = tmp_path_factory.mktemp("16") / "out"
    convert_checkpoint(bfloat16_source, folder, make_recipe("16bit"))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", POSITIONS)
def test_logits_at_16_bits_are_those_of_plain_transformers(
    bfloat16_source, unchanged_weights, tmp_path, name
):
    changes = {"head_dim": 16} | CONFIGS[name]
    folder = with_config(bfloat16_source, tmp_path / "source", CONFIGS[name])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = loader.from_pretrained(
        converted_with_config(unchanged_weights, tmp_path / "out", changes), dtype=torch.float32
    )
    for caches in ((None, None), (DynamicCache(), DynamicCache())):
        expected = token_by_token(plain, caches[0])
        assert (token_by_token(ours, caches[1]) - expected).abs().max() < 1e-4 * expected.std()


def compare(model, run, again=None):
    """Check that `run` gives nearly the same both ways; `again` is the second way's model."""
    ours = run(model)
    with transformers_code(again or model):
        expected = run(again or model)
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    # Activations pass through int8, whose roundings turn on last bits (docs/numerics.md).
    assert (ours.float() - expected).square().mean().sqrt() < 0.01 * expected.float().std()


@torch.no_grad()
@pytest.mark.parametrize("name", POSITIONS)
def test_native_tokens_follow_positions_and_windows(converted, tmp_path, name):
    changes = {"head_dim": 32} | CONFIGS[name]
    if name == "longrope":
        scaling = CONFIGS[name]["rope_scaling"]
        factors = {key: 2 * scaling[key] for key in ("short_factor", "long_factor")}
        changes["rope_scaling"] = scaling | factors
    folder = converted_with_config(converted("2bit"), tmp_path / "out", changes)
    # Two models: on transformers 5.3 a dynamic rotation keeps the scale of the longest sequence.
    model, again = (
        loader.from_pretrained(folder, dtype=torch.float32, ram_cache="1GiB") for _ in range(2)
    )
    compare(model, token_by_token, again)
    compare(model, lambda model: token_by_token(model, DynamicCache()), again)


@pytest.fixture(scope="module")
def model(converted):
    return loader.from_pretrained(converted("2bit"), dtype=torch.float32, ram_cache="1GiB")


def under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return token_by_token(model)


def after_a_prompt_under_autocast(model):
    cache = DynamicCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS[:, :9], past_key_values=cache, use_cache=True)
    return token_by_token(model, cache, 9, 16)


def after_tokens_were_taken_back(model):
    cache = DynamicCache()
    token_by_token(model, cache, end=20)
    cache.crop(-4)
    return token_by_token(model, cache, 16, 20)


def after_one_of_a_batch_was_chosen(model):
    cache = DynamicCache()
    model(torch.cat([IDS, IDS.flip(1)])[:, :9], past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.tensor([1]))
    return token_by_token(model, cache, 9, 16)


def after_inference_mode(model):
    cache = DynamicCache()
    with torch.inference_mode():
        token_by_token(model, cache, end=12)
    return token_by_token(model, cache, 12, 16)


def with_another_default_device(model):
    cache = DynamicCache()
    model(IDS[:, :9], past_key_values=cache, use_cache=True)
    with torch.device("meta"):
        return token_by_token(model, cache, 9, 16)


def with_other_weights_in_the_place_of_ids(model):
    cache = DynamicCache()
    model(IDS[:, :9], past_key_values=cache, use_cache=True)
    embeddings = 2 * model.model.embed_tokens(IDS[:, 9:10])
    return model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "run",
    [
        under_autocast,
        after_a_prompt_under_autocast,
        after_tokens_were_taken_back,
        after_one_of_a_batch_was_chosen,
        after_inference_mode,
        with_another_default_device,
        with_other_weights_in_the_place_of_ids,
    ],
)
def test_logits_are_those_of_transformers_code(model, run):
    compare(model, run)


@torch.no_grad()
def test_a_cache_goes_on_in_a_wider_dtype(converted):
    model = loader.from_pretrained(converted("2bit"), dtype=torch.bfloat16, ram_cache="1GiB")
    cache = DynamicCache()
    token_by_token(model, cache, end=12)
    before = cache.layers[0].keys.clone()
    logits = token_by_token(model.to(torch.float32), cache, 12, 16)
    assert logits.dtype == cache.layers[0].keys.dtype == torch.float32
    assert torch.equal(cache.layers[0].keys[:, :, :12], before.float())


@torch.no_grad()
@pytest.mark.parametrize("token", [-1, 4096, 2**40])
def test_a_token_outside_of_the_vocabulary_is_an_index_error_in_prompts_too(model, token):
    cache = DynamicCache()
    with pytest.raises(IndexError):
        model(torch.tensor([[5, token]]), past_key_values=cache, use_cache=True)
    token_by_token(model, cache := DynamicCache(), end=9)
    with pytest.raises(IndexError):
        model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 9
