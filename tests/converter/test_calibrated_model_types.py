"""Calibrated conversions of every admitted model type: the same bytes by every way, verified and
loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from interrupted_runs import Interruption, hashes, stop_after
from random_models import MODELS, make_model, write_checkpoint

import loader
from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.index import read_index
from formats.reading.verify import verify_folder

RANDOM = {"calibrate": "random", "calibration_tokens": 1024}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Name of a random model -> (its checkpoint, its calibrated conversion by one worker)."""
    root = tmp_path_factory.mktemp("calibrated")

    def convert(name: str) -> tuple[Path, Path]:
        source, out = root / name / "source", root / name / "out"
        if not source.exists():
            write_checkpoint(source, name, fused=False)
            convert_checkpoint(source, out, make_recipe("2bit", **RANDOM))
        return source, out

    return convert


@pytest.mark.parametrize("name", MODELS)
def test_two_calibrated_bits_verify_and_load(
    calibrated: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    _, out = calibrated(name)
    assert "calibration" in read_index(out).producer.versions
    assert verify_folder(out, read_data=True).problems == []
    logits = loader.from_pretrained(out, device="cpu")(torch.arange(3, 51)[None]).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", ["qwen3_moe with dense layers", "olmoe"])
def test_workers_and_an_interruption_change_no_byte(
    calibrated: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    source, expected = calibrated(name)
    with monkeypatch.context() as patch:
        stop_after(patch, 18)
        with pytest.raises(Interruption):
            convert_checkpoint(source, tmp_path / "out", make_recipe("2bit", **RANDOM))
    convert_checkpoint(source, tmp_path / "out", make_recipe("2bit", **RANDOM), ConvertOptions(3))
    assert hashes(tmp_path / "out") == hashes(expected)


def test_bits_are_chosen_for_layers_with_experts(
    tmp_path: Path, calibrated: Callable[[str], Any]
) -> None:
    source, _ = calibrated("qwen3_moe with dense layers")
    done = convert_checkpoint(
        source, tmp_path / "out", make_recipe("2bit", target_bpw=18.0, **RANDOM)
    )
    assert verify_folder(tmp_path / "out").problems == []
    assert len(read_index(tmp_path / "out").layers) == 3
    assert 14 < done.plan.expert_bits <= 18


def test_bits_for_a_repository_are_chosen_within_the_shards_of_one_layer(
    hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    make_model("qwen3_moe with dense layers").save_pretrained(folder, max_shard_size="60KB")
    hub.add("me/dense", folder)
    with Checkpoint(folder) as checkpoint:
        shards: dict[int | None, set[str]] = {}
        for name, weight in checkpoint.trunk.items():
            shards.setdefault(checkpoint.layer_of(name), set()).add(weight.shard)
        for key, weight in checkpoint.experts.items():
            shards[checkpoint.shape.experts[key.layer].decoder_layer].add(weight.shard)
        limit = max(sum(checkpoint.shards[name] for name in names) for names in shards.values())
    source = HubModel.open("me/dense", max_disk_bytes=limit)
    done = convert_checkpoint(
        source, tmp_path / "out", make_recipe("2bit", target_bpw=18.0, **RANDOM)
    )
    assert done.done == "converted"
