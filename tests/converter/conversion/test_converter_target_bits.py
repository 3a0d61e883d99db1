"""Conversions whose bits differ by layer: the same bytes by every way, the choice in the index, the
sizes of the files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from inside import inside
from interrupted_runs import Interruption, hashes, interrupted
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.calibration.bit_sensitivity import BitSensitivity
from converter.checkpoint.shards.hub_model import HubModel
from converter.convert import Converted, ConvertOptions, convert_checkpoint
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import OutputError, SourceError
from formats.index import Recipe, read_index
from formats.reading.verify import verify_folder

RULES = "1=3bit,2:0,2/down=4bit"


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    to_target(source, out)
    return hashes(out)


def to_target(
    source: Path | HubModel, out: Path, target: float = 10.0, **options: Any
) -> Converted:
    recipe = make_recipe(
        target_bpw=target, solver="feedback", calibrate="random", calibration_tokens=1024
    )
    return convert_checkpoint(source, out, recipe, ConvertOptions(**options))


def with_changed_tensors(
    source: Path, folder: Path, change: Callable[[str, Tensor], Tensor]
) -> Path:
    """Write a copy of a checkpoint; each tensor is `change(name, tensor)`."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
            save_file(tensors, folder / file.name, {"format": "pt"})
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def by_rules(source: Path, out: Path, rules: str = RULES, **options: Any) -> Converted:
    return convert_checkpoint(
        source, out, make_recipe(rules=[rules], solver="hqq"), ConvertOptions(**options)
    )


def test_a_mixed_folder_has_the_packings_of_its_rules_and_is_whole(
    source: Path, tmp_path: Path
) -> None:
    done = by_rules(source, tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    bits = [
        [(artifact.layout(n, e).gate_up.nbits, artifact.layout(n, e).down.nbits) for e in range(4)]
        for n in range(3)
    ]
    assert bits == [[(2, 2)] * 4, [(3, 3)] * 4, [(2, 4), (2, 2), (2, 4), (2, 2)]]
    assert not verify_folder(tmp_path / "out", read_data=True).problems
    stored = sum(entry.length for layer in artifact.index.layers for entry in layer.experts)
    assert done.plan.expert_bytes == stored
    assert done.plan.expert_bits == 8 * stored / (12 * 3 * 64 * 96)
    assert done.plan.layer_bytes == [
        layer.size_bytes - offset(layer) for layer in artifact.index.layers
    ]


def rules_in(recipe: Recipe) -> list[str]:
    return [rule.text for rule in ConversionRecipe.read(recipe).options.rules]


def offset(layer: Any) -> int:
    return int(layer.experts[0].offset)


@pytest.mark.parametrize("workers", [1, 3])
def test_mixed_bits_give_the_same_bytes_for_any_workers_and_interruption(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    by_rules(source, tmp_path / "one")
    monkeypatch.setattr("interrupted_runs.convert", by_rules)
    interrupted(source, tmp_path / "out", monkeypatch, 6, max_workers=workers)
    by_rules(source, tmp_path / "out", max_workers=workers)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one")


def test_other_rules_are_another_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interrupted_runs.convert", by_rules)
    interrupted(source, tmp_path / "out", monkeypatch, 6)
    with pytest.raises(OutputError, match="recipe"):
        by_rules(source, tmp_path / "out", "1=3bit")
    by_rules(source, tmp_path / "out")
    with pytest.raises(OutputError, match=r"recipe \(options\)"):
        by_rules(source, tmp_path / "out", "1=3bit")


def test_the_choice_is_in_the_index_and_what_it_says_is_what_was_done(
    source: Path, tmp_path: Path
) -> None:
    done = to_target(source, tmp_path / "out")
    index = read_index(tmp_path / "out")
    assert index.recipe == done.recipe.recorded
    assert index.recipe.options["target_bpw"] == 10.0
    assert index.recipe.options["rule.1"]
    assert 9.5 < done.plan.expert_bits <= 10.0
    chosen = make_recipe(rules=rules_in(index.recipe), calibrate="random", calibration_tokens=1024)
    assert chosen.recorded.options | {"target_bpw": 10.0} == index.recipe.options
    convert_checkpoint(source, tmp_path / "by-rules", chosen, ConvertOptions())
    for layer in range(3):
        name = f"experts/layer-{layer:03}.safetensors"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "by-rules" / name).read_bytes()


def test_a_target_gives_the_same_bytes_for_any_workers(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    to_target(source, tmp_path / "out", max_workers=3)
    assert hashes(tmp_path / "out") == reference


@pytest.mark.parametrize("stop_in", ["measuring", "converting"])
def test_a_target_gives_the_same_bytes_after_an_interruption_and_measures_no_layer_again(
    source: Path,
    reference: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_in: str,
) -> None:
    measured: list[int] = []
    original = inside(BitSensitivity, "layer")

    def layer(self: BitSensitivity, number: int, *args: Any) -> Any:
        if stop_in == "measuring" and number == 2 and 2 not in measured:
            measured.append(number)
            raise Interruption
        measured.append(number)
        return original(self, number, *args)

    monkeypatch.setattr(BitSensitivity, "_layer", layer)
    out = tmp_path / "out"
    if stop_in == "measuring":
        with pytest.raises(Interruption):
            to_target(source, out)
    else:
        monkeypatch.setattr("interrupted_runs.convert", to_target)
        interrupted(source, out, monkeypatch, 6)
    assert to_target(source, out).done == "converted"
    assert measured == [0, 1, 2, 2] if stop_in == "measuring" else [0, 1, 2]
    assert hashes(out) == reference
    assert to_target(source, out).done == "already complete"
    assert to_target(source, out).plan.expert_bits <= 10.0


def test_another_target_is_another_conversion(source: Path, tmp_path: Path) -> None:
    to_target(source, tmp_path / "out")
    with pytest.raises(OutputError, match=r"recipe \(options\).*'target_bpw': 10\.0"):
        to_target(source, tmp_path / "out", 10.5)


def test_the_layer_whose_error_is_largest_gets_the_bits(source: Path, tmp_path: Path) -> None:
    """The other layers hardly change the residual stream that this layer's output is added to."""
    loud = with_changed_tensors(
        source,
        tmp_path / "loud",
        lambda name, tensor: (
            tensor * 2.0**-10
            if name.endswith(".w2.weight") and ".layers.1." not in name
            else tensor
        ),
    )
    rules = rules_in(to_target(loud, tmp_path / "out").recipe.recorded)
    assert {rule.partition("/")[0] for rule in rules} == {"1"}


def test_activations_that_are_nan_name_the_layer(source: Path, tmp_path: Path) -> None:
    norm = "model.layers.1.post_attention_layernorm.weight"
    broken = with_changed_tensors(
        source,
        tmp_path / "broken",
        lambda name, tensor: torch.full_like(tensor, float("inf")) if name == norm else tensor,
    )
    with pytest.raises(SourceError, match=r"layers\.1\.post_attention_layernorm.* NaN or infinite"):
        to_target(broken, tmp_path / "out")


def test_nothing_of_the_measurement_stays(source: Path, tmp_path: Path) -> None:
    to_target(source, tmp_path / "out")
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
        == "10bpw"
    )


def test_a_target_of_a_repository_gives_the_bytes_of_the_folder_and_leaves_no_shard(
    hub: HubServer, source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    hub.add("me/mini", source)
    largest = max(p.stat().st_size for p in source.glob("*.safetensors"))
    out = tmp_path / "out"
    to_target(HubModel.open("me/mini", max_disk_bytes=2 * largest), out, max_workers=2)
    found = hashes(out)
    weights = [name for name in reference if name.endswith(".safetensors")]
    assert len(weights) == 4
    assert {name: found[name] for name in weights} == {name: reference[name] for name in weights}
    assert not (out / ".moe-convert.source").exists()
