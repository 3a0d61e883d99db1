"""Whole conversions: every way gives the same bytes, in an output folder of their own."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import (
    convert,
    hashes,
    interrupted,
)
from make_checkpoint import SHAPES, make_checkpoint
from safetensors.torch import load_file, save_file

from converter.checkpoint.source import Checkpoint
from converter.conversion.worker import Worker
from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import DoesNotFitError, OutputError, RecipeError, SourceError
from formats.reading.direct_reader import DirectReader
from formats.reading.verify import verify_folder
from formats.tiles import expert_weights


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_bytes(
    source: Path, reference: dict[str, str], tmp_path: Path, workers: int
) -> None:
    convert(source, tmp_path / "out", max_workers=workers)
    assert hashes(tmp_path / "out") == reference


@pytest.mark.parametrize("changes", [{"shards": 1}, {"shards": 5}, {"layout": "fused"}], ids=str)
def test_any_sharding_gives_the_same_bytes_but_for_the_record_of_the_source(
    source: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    convert(source, tmp_path / "one")
    make_checkpoint(tmp_path / "mini", SHAPES["mini"], 3, **changes)
    convert(tmp_path / "mini", tmp_path / "other")
    assert hashes(tmp_path / "one", without_source=True) == hashes(
        tmp_path / "other", without_source=True
    )


def test_complete_folder_is_left_as_it_is(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(source, out)
    assert convert(source, out) == "already complete"
    assert hashes(out) == reference
    with pytest.raises(OutputError, match=r"another recipe(?s:.*)--force"):
        convert(source, out, "3bit")
    make_checkpoint(tmp_path / "mini", SHAPES["mini"], 3, shards=2, seed=1)
    with pytest.raises(OutputError, match="another source"):
        convert(tmp_path / "mini", out)
    assert hashes(out) == reference


def test_complete_folder_of_another_config_is_named(source: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(source, tmp_path / "mini"))
    convert(mine, tmp_path / "out")
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(
        OutputError, match=r"another config\.json \(rms_norm_eps\): recorded 1e-05, now 0\.001"
    ):
        convert(mine, tmp_path / "out")


def test_force_replaces_a_complete_conversion(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(source, out, "3bit")
    convert(source, out, force=True)
    assert hashes(out) == reference


def test_folder_of_somebody_else_is_not_touched_without_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write(?s:.*)--force"):
        convert(source, out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    convert(source, out, force=True)
    assert (out / "thesis.txt").read_text() == "mine"


def test_second_writer_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".moe-convert.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"):
            convert(source, out)


def test_too_little_disk_is_said_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DoesNotFitError, match="free are 1000"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_the_layers_add_up_to_the_whole(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert convert(source, out, part=(2, 2)) == "part"
    assert convert(source, out, part=(1, 2)) == "part"
    assert not (out / "moe_index.json").exists()
    convert(source, out)
    assert hashes(out) == reference


def test_weight_that_is_not_finite_stops_the_conversion_and_keeps_the_rest(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "mini"
    make_checkpoint(broken, SHAPES["mini"], 3, shards=1)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(SourceError, match=r"layers\.2\.block_sparse_moe\.experts\.3\.w2"):
        convert(broken, tmp_path / "out", max_workers=2)
    assert (tmp_path / "out" / "experts" / "layer-001.safetensors").exists()
    assert not (tmp_path / "out" / "moe_index.json").exists()


def test_source_cut_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mini"
    make_checkpoint(folder, SHAPES["mini"], 3)
    original = Worker.expert

    def expert(self: Worker, *args: Any) -> Any:
        os.truncate(folder / "model.safetensors", 100_000)
        return original(self, *args)

    monkeypatch.setattr(Worker, "expert", expert)
    with pytest.raises(SourceError, match="cut off inside tensor"):
        convert(folder, tmp_path / "out")


def test_zstd_folder_decodes_to_the_same_experts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "raw")
    interrupted(source, tmp_path / "zstd", monkeypatch, codec="zstd")
    convert(source, tmp_path / "zstd", codec="zstd")
    assert verify_folder(tmp_path / "zstd", read_data=True).problems == []
    raw, compressed = Artifact.open(tmp_path / "raw"), Artifact.open(tmp_path / "zstd")
    with DirectReader(raw) as one, DirectReader(compressed) as other:
        for layer in range(3):
            for expert in range(4):
                assert torch.equal(one.read(layer, expert), other.read(layer, expert))


def test_converted_weights_are_near_the_source_and_quality_says_how_near(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(source, out, "4bit")
    artifact = Artifact.open(out)
    quality = json.loads((out / "quality.json").read_text())
    with Checkpoint(source) as checkpoint, DirectReader(artifact) as reader:
        got = dict(
            zip(
                ("gate", "up", "down"),
                expert_weights(artifact.layout(2, 3), reader.read(2, 3)),
                strict=True,
            )
        )
        for key, weight in checkpoint.experts.items():
            if (key.layer, key.expert) == (2, 3):
                true = checkpoint.read_rows(weight, 0, weight.shape[0]).float()
                error = float((got[key.projection] - true).norm() / true.norm())
                recorded = next(
                    e for e in quality["experts"] if (e["layer"], e["expert"]) == (2, 3)
                )
                assert recorded[key.projection] == pytest.approx(error, rel=1e-4)
                assert error < 0.1
    assert 0 < quality["totals"]["attention"] < 0.1


def test_side_files_are_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    make_checkpoint(folder, SHAPES["mini"], 1)
    (folder / "LICENSE.txt").write_bytes(b"licence \xff\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_bytes(b"not this")
    convert(folder, tmp_path / "out")
    for name in ("LICENSE.txt", "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "moe_convert"
    source_config = json.loads((folder / "config.json").read_text())
    renamed = {
        "dtype": source_config.pop("torch_dtype"),
        "rope_parameters": {"rope_type": "default", "rope_theta": source_config.pop("rope_theta")},
    }
    defaults = {"head_dim": 16, "pad_token_id": None, "router_jitter_noise": 0.0}
    assert config == {**source_config, **renamed, **defaults}


@pytest.mark.parametrize(
    "options", [{"max_workers": 0}, {"codec": "lzma"}, {"part": (3, 2)}, {"part": (0, 2)}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        ConvertOptions(**options)


def test_head_is_packed_where_the_recipe_says_so(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "out", make_recipe("4bit", head_bits=4, solver="hqq"))
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.index.trunk.packed["lm_head"].rows == SHAPES["mini"].vocabulary
    assert artifact.index.recipe.name == "custom"
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert 0 < quality["trunk"]["lm_head"] < 0.1


def test_tied_head_cannot_be_packed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "mini", SHAPES["mini"], 1, tied=True)
    with pytest.raises(RecipeError, match="tie_word_embeddings"):
        convert_checkpoint(
            tmp_path / "mini", tmp_path / "out", make_recipe("4bit", head_bits=4, solver="hqq")
        )
