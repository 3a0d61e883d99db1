"""Every admitted model type from checkpoint to tokens equals plain transformers, in each key
layout.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import MODELS, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loader
from converter.checkpoint.source import Checkpoint
from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.reading.verify import verify_folder
from formats.repair.index_rebuild import rebuild_index

every_model = pytest.mark.parametrize("name", MODELS)
TOKENS = torch.arange(3, 51)[None] * 7 % 128


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, fused) -> the folder of a checkpoint in float16, which 16 bits hold exactly."""
    made: dict[tuple[str, bool], Path] = {}

    def source(name: str, *, fused: bool = False) -> Path:
        if (name, fused) not in made:
            folder = tmp_path_factory.mktemp("source")
            made[name, fused] = write_checkpoint(folder, name, fused=fused)
        return made[name, fused]

    return source


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, sources: Any) -> Any:
    """(name, recipe, fused) -> the converted folder."""
    made: dict[tuple[str, str, bool], Path] = {}

    def convert(name: str, recipe: str, *, fused: bool = False) -> Path:
        if (name, recipe, fused) not in made:
            out = tmp_path_factory.mktemp("converted") / "out"
            convert_checkpoint(
                sources(name, fused=fused), out, make_recipe(recipe, calibrate="none")
            )
            made[name, recipe, fused] = out
        return made[name, recipe, fused]

    return convert


def quarter(folder: Path) -> list[int]:
    """Slots for a quarter of the experts of each layer, enough for one token."""
    a = Artifact.open(folder).architecture
    return [max(a.num_local_experts // 4, a.num_experts_per_tok)] * a.expert_layers


@every_model
def test_both_layouts_of_keys_are_the_same_weights(sources: Any, name: str) -> None:
    stored = [
        load_file(sources(name, fused=fused) / "model.safetensors").keys()
        for fused in (False, True)
    ]
    assert stored[0] != stored[1]
    with Checkpoint(sources(name)) as one, Checkpoint(sources(name, fused=True)) as other:
        assert one.experts.keys() == other.experts.keys()
        assert one.trunk.keys() == other.trunk.keys()
        for key, weight in one.experts.items():
            twin = other.experts[key]
            assert torch.equal(
                one.read_rows(weight, 0, weight.shape[0]), other.read_rows(twin, 0, twin.shape[0])
            )


@every_model
@torch.inference_mode()
def test_logits_at_16_bits_are_those_of_plain_transformers(
    converted: Any, sources: Any, name: str
) -> None:
    folder = converted(name, "16bit")
    plain = AutoModelForCausalLM.from_pretrained(sources(name), dtype=torch.float32)
    expected = plain(TOKENS).logits
    found = loader.from_pretrained(folder, dtype=torch.float32, device="cpu")(TOKENS).logits
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.std())


@every_model
@torch.inference_mode()
def test_greedy_tokens_with_a_quarter_of_the_experts_cached_are_those_of_plain_transformers(
    converted: Any, sources: Any, name: str
) -> None:
    folder = converted(name, "16bit")
    assert verify_folder(folder, read_data=True).problems == []
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = AutoModelForCausalLM.from_pretrained(sources(name), dtype=torch.float32).generate(
        TOKENS, **options
    )
    model = loader.from_pretrained(folder, dtype=torch.float32, device="cpu", slots=quarter(folder))
    assert torch.equal(model.generate(TOKENS, **options), expected)
    assert model.moe_stats().total.misses > 0


@every_model
@torch.inference_mode()
def test_experts_of_the_next_layer_are_guessed_by_its_router(converted: Any, name: str) -> None:
    folder = converted(name, "2bit")
    model = loader.from_pretrained(folder, device="cpu", slots=quarter(folder), prefetch=4)
    model.generate(TOKENS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model.moe_stats().total.guesses > 0


@every_model
def test_two_bits_convert_verify_and_load(converted: Any, name: str) -> None:
    folder = converted(name, "2bit")
    assert verify_folder(folder, read_data=True).problems == []
    logits = loader.from_pretrained(folder, device="cpu", slots=quarter(folder))(TOKENS).logits
    assert bool(logits.isfinite().all())


@every_model
def test_both_layouts_convert_to_the_same_bytes(converted: Any, name: str) -> None:
    one, other = (converted(name, "2bit", fused=fused) for fused in (False, True))
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(files) == 1 + Artifact.open(one).architecture.expert_layers
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@every_model
def test_a_lost_index_is_written_again_from_the_files(converted: Any, name: str) -> None:
    path = converted(name, "2bit") / "moe_index.json"
    good = path.read_bytes()
    index = json.loads(good)
    for field in ("architecture", "trunk", "layers", "packings", "config"):
        del index[field]
    path.write_text(json.dumps(index))
    rebuild_index(path.parent)
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("name", "decoder_layers"),
    [
        ("qwen3_moe with dense layers", [1, 3, 4]),
        ("qwen3_moe with every second layer dense", [1, 3]),
    ],
)
def test_layers_are_counted_among_those_with_experts(
    converted: Any, name: str, decoder_layers: list[int]
) -> None:
    folder = converted(name, "2bit")
    architecture = Artifact.open(folder).architecture
    assert architecture.expert_modules == [
        f"model.layers.{layer}.mlp.experts" for layer in decoder_layers
    ]
    assert len(list((folder / "experts").iterdir())) == len(decoder_layers)


def test_parts_of_a_model_with_dense_layers_make_the_same_bytes(
    converted: Any, sources: Any, tmp_path: Path
) -> None:
    name = "qwen3_moe with dense layers"
    recipe = make_recipe("2bit", calibrate="none")
    for part in ((1, 2), (2, 2), None):
        convert_checkpoint(sources(name), tmp_path / "out", recipe, ConvertOptions(part=part))
    whole = converted(name, "2bit")
    for file in (path.relative_to(whole) for path in whole.rglob("*.safetensors")):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes(), file


def test_zstd_frames_of_a_model_with_dense_layers_load(
    sources: Any, converted: Any, tmp_path: Path
) -> None:
    name = "qwen3_moe with dense layers"
    recipe = make_recipe("2bit", calibrate="none")
    convert_checkpoint(sources(name), tmp_path / "out", recipe, ConvertOptions(codec="zstd"))
    assert verify_folder(tmp_path / "out", read_data=True).problems == []
    packed, plain = (
        loader.from_pretrained(f, device="cpu") for f in (tmp_path / "out", converted(name, "2bit"))
    )
    with torch.inference_mode():
        assert torch.equal(packed(TOKENS).logits, plain(TOKENS).logits)
