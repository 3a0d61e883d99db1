"""The model card of a converted folder."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from project_paths import ROOT
from safetensors import safe_open

from converter.convert import convert_checkpoint
from converter.publish.card_memory import SHARES, Memory, model_parameters
from converter.publish.card_metadata import parse_metadata, split_card
from converter.publish.model_card import CardFacts, card_metadata, card_part
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.index import Adapter
from formats.quality import Comparison, Evaluation, read_quality, save_evaluation
from formats.sizes import format_size, size_option
from loader.planning.memory_plan import Machine, ModelSizes, plan_shares

Converted = Callable[[str], Path]


def card_of(folder: Path, **facts: Any) -> str:
    return card_part(Artifact.open(folder), read_quality(folder), CardFacts("a/b", **facts))


def metadata_of(folder: Path) -> dict[str, Any]:
    return parse_metadata(split_card((folder / "README.md").read_text())[0])


@pytest.fixture
def source(example_folder: Path, tmp_path: Path) -> Path:
    """A copy of the example without a card."""
    folder = Path(shutil.copytree(example_folder, tmp_path / "source"))
    (folder / "README.md").unlink()
    return folder


def convert(source: Path, **recipe: Any) -> Path:
    out = source.parent / "out"
    convert_checkpoint(source, out, make_recipe(**{"solver": "hqq", **recipe}))
    return out


def test_card_counts_the_models_parameters(converted: Converted, example_folder: Path) -> None:
    index = Artifact.open(converted("2bit")).index
    count = 0
    for shard in example_folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            count += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert model_parameters(index) == count
    assert f"{count:,}" in card_of(converted("2bit"))


@pytest.mark.parametrize("recipe", ["2bit", "16bit", "2bit-down3"])
def test_memory_is_that_of_plan(converted: Converted, recipe: str) -> None:
    artifact = Artifact.open(converted(recipe))
    plans = plan_shares(
        ModelSizes.of_folder(artifact),
        Machine(1e9, 1e9),
        [share for _, share in SHARES],
        context=4096,
        prompt=512,
    )
    memory = Memory.of(artifact)
    caches = {memory.cache_bytes(share) for _, share in SHARES}
    assert {plan.cache_bytes for plan in plans} == caches
    assert {plan.ram_bytes for plan in plans} == {memory.fixed_bytes + cache for cache in caches}
    card = card_of(converted(recipe))
    for plan in plans:
        row = f"| {format_size(plan.ram_bytes)} | `--ram-cache {size_option(plan.cache_bytes)}` |"
        assert row in card


def test_measured_quality_is_in_the_card_with_its_meaning(converted_copy: Path) -> None:
    assert "moe-convert eval" in card_of(converted_copy)
    row = Comparison("english", 4, 1000, 61.9, 61.0, 1.0147, 0.001, 0.0123, 0.001, 0.95, [0.9])
    save_evaluation(converted_copy, Evaluation("tiny", 256, {}, [row], row))
    card = card_of(converted_copy)
    assert "| `english` | 1,000 | 61.900 | 61.000 | 1.0147 | 0.01230 | 95.00% |" in card
    assert "1 means no loss" in card
    assert "moe-convert eval" not in card


def test_quality_that_nobody_measured_is_not_claimed(converted_copy: Path) -> None:
    (converted_copy / "quality.json").unlink()
    card = card_of(converted_copy)
    assert "Nobody has compared" in card
    assert "relative errors" not in card


def test_card_of_16_bits_claims_no_quantization(converted: Converted) -> None:
    card = card_of(converted("16bit"))
    assert "Its experts are as in the source." in card
    assert "relative errors" not in card
    assert "Rounding" not in card
    metadata = card_metadata(
        Artifact.open(converted("16bit")).index, CardFacts("a/b", base_model="c/d")
    )
    assert "base_model_relation" not in metadata
    assert "quantized" not in metadata["tags"]


def test_source_with_a_card_gives_licence_languages_and_tags(source: Path) -> None:
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tongyi\nlicense_link: https://example.org/l\n"
        "language: [en, zh]\ntags: [chat, transformers]\nbase_model: x/not-ours\n---\n# Source\n"
    )
    out = convert(source)
    metadata = metadata_of(out)
    assert (metadata["license"], metadata["license_name"]) == ("other", "tongyi")
    assert metadata["license_link"] == "https://example.org/l"
    assert metadata["language"] == ["en", "zh"]
    assert metadata["tags"] == ["mixtral", "moe", "quantized", "moe-convert", "chat"]
    assert "base_model" not in metadata
    text = (out / "README.md").read_text()
    assert "# Source" not in text
    assert "is `other` (`tongyi`), see [`https://example.org/l`](https://example.org/l)" in text


def test_licence_that_nobody_stated_is_not_guessed(source: Path) -> None:
    out = convert(source)
    assert "license" not in metadata_of(out)
    assert "The licence is not known" in (out / "README.md").read_text()


def test_licence_file_is_linked(source: Path) -> None:
    (source / "LICENSE.txt").write_text("MIT License\n\nPermission is hereby granted")
    out = convert(source)
    metadata = metadata_of(out)
    assert (metadata["license"], metadata["license_link"]) == ("mit", "LICENSE.txt")
    assert "[`LICENSE.txt`](LICENSE.txt)" in (out / "README.md").read_text()


def test_unreadable_card_of_a_source_does_not_stop_a_conversion(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in metadata_of(convert(source))
    assert "no licence or tag is taken from it" in caplog.text


def test_merged_adapters_are_named(converted: Converted) -> None:
    adapters = (
        Adapter("me/lora", "1" * 40, "2" * 64, "3" * 64),
        Adapter("local-lora", None, "4" * 64, "5" * 64),
    )
    artifact = Artifact.open(converted("2bit"))
    source = replace(artifact.index.source, name="me/tiny", revision="0" * 40, adapters=adapters)
    index = replace(artifact.index, source=source)
    metadata = card_metadata(index, CardFacts("a/b"))
    assert metadata["base_model"] == ["me/tiny", "me/lora"]
    assert metadata["base_model_relation"] == "quantized"
    facts = CardFacts("a/b", carried={"license": "mit"})
    card = card_part(Artifact(artifact.folder, index, artifact.config), None, facts)
    assert f"merged into the source: `me/lora`, commit `{'1' * 40}`" in card
    assert "merged into the source: `local-lora`, a local folder" in card
    assert f"--adapter me/lora@{'1' * 40} --adapter ./local-lora" in card
    assert "a licence of its own" in card


def test_chat_template_in_the_tokenizers_configuration_is_found(source: Path) -> None:
    path = source / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "chat_template": "{{ messages[0].content }}"}
    path.write_text(json.dumps(config))
    card = (convert(source) / "README.md").read_text()
    assert "apply_chat_template" in card
    assert "no chat template" not in card


def test_mixed_bits_are_listed(source: Path) -> None:
    card = (convert(source, rules=["0-3/down=3bit"]) / "README.md").read_text()
    assert "| down of the experts | 2 bits in groups of 16" in card
    assert "; 3 bits in groups of 32" in card
    assert "--layer-bits 0-3/down=tile32-q3-g32-s4" in card


def test_limits_are_those_of_the_package(converted: Converted) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    card = card_of(converted("2bit"))
    assert {"torch>=2.6", "transformers>=5.3,<6"} <= set(project["dependencies"])
    assert "transformers 5.3 or newer, before 6, and torch 2.6 or newer" in card
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or newer" in card


def test_source_on_the_hub_is_the_base_model(converted: Converted) -> None:
    index = Artifact.open(converted("2bit")).index
    index = replace(index, source=replace(index.source, name="me/tiny", revision="0" * 40))
    assert card_metadata(index, CardFacts("a/b"))["base_model"] == "me/tiny"
