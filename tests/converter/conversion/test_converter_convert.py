"""Whole conversions: every way gives the same bytes, and an interruption loses or mixes nothing."""

import contextlib
import fcntl
import json
import logging
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import Interruption, convert, hashes, interrupted
from make_checkpoint import SHAPES, make_checkpoint
from project_paths import ROOT, SUPPORT
from safetensors.torch import load_file, save_file

from converter.checkpoint.source import Checkpoint
from converter.conversion.worker import Worker
from converter.convert import ConvertOptions, convert_checkpoint
from converter.journal.journal_file import Journal
from converter.journal.keys import ExpertKey
from converter.journal.records import LayerRecord, Record, ShardRecord
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import DoesNotFitError, NotConvertedError, OutputError, RecipeError, SourceError
from formats.files.partial_file import partial_path
from formats.index import read_index
from formats.layer_file import compression_paths
from formats.reading.direct_reader import DirectReader
from formats.reading.verify import verify_folder
from formats.tiles import expert_weights
from formats.writer import LayerWriter


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    convert(source, out)
    return hashes(out)


def converted_experts(
    monkeypatch: pytest.MonkeyPatch, conversion: Callable[[], Any]
) -> list[tuple[int, int]]:
    """(layer, expert) of every expert that a conversion works on, in order."""
    done: list[tuple[int, int]] = []
    original = Worker.expert

    def expert(self: Worker, key: ExpertKey, calibrated: Any) -> Any:
        done.append((key.layer, key.expert))
        return original(self, key, calibrated)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "expert", expert)
        conversion()
    return done


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


def test_interruption_leaves_nothing_that_looks_complete_and_is_resumed_to_the_same_bytes(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    assert not (out / "moe_index.json").exists()
    with pytest.raises(NotConvertedError, match="unfinished"):
        verify_folder(out)
    assert convert(source, out) == "converted"
    assert hashes(out) == reference


def test_frames_of_a_complete_layer_that_a_power_loss_brought_back_are_removed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, good = tmp_path / "out", tmp_path / "good"
    convert(source, good, codec="zstd")
    interrupted(source, out, monkeypatch, codec="zstd")
    for path in compression_paths(out / "experts/layer-000.safetensors"):
        path.write_bytes(b"frames")
    convert(source, out, codec="zstd")
    assert hashes(out) == hashes(good)


def test_resume_does_not_convert_an_expert_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch, 5)
    done = converted_experts(monkeypatch, lambda: convert(source, out))
    assert done == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_lost_partial_files_are_written_again(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    (out / "experts" / "layer-001.safetensors.partial").unlink()
    (out / "trunk.safetensors.partial").unlink()
    os.truncate(out / "experts" / "layer-000.safetensors", 5000)
    convert(source, out)
    assert hashes(out) == reference


def test_torn_last_line_of_the_journal_is_dropped(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    with open(out / ".moe-convert.journal", "ab") as journal:
        journal.write(b'0123456789abcdef {"unit": "expert", "layer": 1, "exp')
    convert(source, out)
    assert hashes(out) == reference


def test_damaged_fingerprint_of_the_journal_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    flip(out / ".moe-convert.journal", 40)
    with pytest.raises(OutputError, match="line 1 is damaged") as caught:
        convert(source, out)
    assert "--no-resume" in caught.value.hint


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def unfinished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that stopped in its second layer. Tests only copy it."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(source, out, patch)
    return out


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_flipped_bit_in_a_line_of_the_journal_costs_its_work_and_changes_no_byte(
    source: Path, reference: dict[str, str], unfinished: Path, tmp_path: Path, share: float,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = Path(shutil.copytree(unfinished, tmp_path / "out"))
    journal = out / ".moe-convert.journal"
    data = journal.read_bytes()
    begin = data.index(b"\n") + 1
    position = begin + int(share * (len(data) - begin))
    flip(journal, position, bit=position % 7)
    convert(source, out)
    assert hashes(out) == reference
    assert "is damaged: its work is done again" in caplog.text


@pytest.mark.parametrize(
    "file", ["experts/layer-001.safetensors.partial", "trunk.safetensors.partial"]
)
@pytest.mark.parametrize("position", [4100, 6000])
def test_flipped_bit_in_recorded_bytes_of_a_partial_file_changes_no_byte_of_the_result(
    source: Path,
    reference: dict[str, str],
    unfinished: Path,
    tmp_path: Path,
    file: str,
    position: int,
) -> None:
    out = Path(shutil.copytree(unfinished, tmp_path / "out"))
    flip(out / file, position, bit=3)
    convert(source, out)
    assert hashes(out) == reference


@pytest.fixture(scope="module", params=["none", "zstd"])
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory, codec: str) -> Path:
    """The undisturbed conversion. Tests only read it."""
    out = tmp_path_factory.mktemp("good") / "out"
    convert(source, out, codec=codec)
    return out


@pytest.fixture(scope="module")
def with_complete_layer(source: Path, tmp_path_factory: pytest.TempPathFactory, codec: str) -> Path:
    """A conversion that stopped after its first layer was complete. Tests only copy it."""
    out = tmp_path_factory.mktemp("complete-layer") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(source, out, patch, codec=codec)
    return out


def flip_in_layer(out: Path, good: Path, part: str) -> Path:
    """Flips one bit in a part of the first layer's complete file, whose places the index of `good`
    has.
    """
    layer = read_index(good).layers[0]
    positions = {
        "header": 40,
        "first byte of expert 0": layer.experts[0].offset,
        "last byte of expert 2": layer.experts[2].offset + layer.experts[2].length - 1,
        "filler behind expert 1": layer.experts[1].offset + layer.experts[1].length,
        "last byte of the file": layer.size_bytes - 1,
    }
    flip(out / layer.file, positions[part], bit=5)
    return out / layer.file


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("header", "the bytes of its header changed"),
        ("first byte of expert 0", "the bytes of expert 0 changed"),
        ("last byte of expert 2", "the bytes of expert 2 changed"),
        ("filler behind expert 1", "the zero bytes behind expert 1 changed"),
        ("last byte of the file", "the zero bytes behind expert 3 changed"),
    ],
)
def test_flipped_bit_in_a_complete_layer_file_changes_no_byte_of_the_result(
    source: Path,
    good: Path,
    with_complete_layer: Path,
    tmp_path: Path,
    codec: str,
    part: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    damaged = flip_in_layer(out, good, part)
    convert(source, out, codec=codec)
    assert hashes(out) == hashes(good)
    assert f"{damaged}: {said}" in caplog.text


def test_undamaged_complete_layer_file_is_kept_without_a_warning(
    source: Path,
    good: Path,
    with_complete_layer: Path,
    tmp_path: Path,
    codec: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    layer = out / "experts" / "layer-000.safetensors"
    before = layer.stat().st_ino
    convert(source, out, codec=codec)
    assert layer.stat().st_ino == before
    assert hashes(out) == hashes(good)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("codec", ["none"], indirect=True)
def test_of_a_damaged_complete_layer_only_the_damaged_expert_is_converted_again(
    source: Path,
    good: Path,
    with_complete_layer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    flip_in_layer(out, good, "last byte of expert 2")
    again = converted_experts(monkeypatch, lambda: convert(source, out))
    assert [key for key in again if key[0] == 0] == [(0, 2)]
    assert (
        "the bytes of expert 0 2 changed since they were written: converting it again"
        in caplog.text
    )
    assert hashes(out) == hashes(good)


@pytest.mark.parametrize("size_bytes", [5000, 200_000])
@pytest.mark.parametrize("codec", ["none"], indirect=True)
def test_complete_layer_file_of_another_size_is_written_again_with_a_warning(
    source: Path, good: Path, with_complete_layer: Path, tmp_path: Path, size_bytes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    os.truncate(out / "experts" / "layer-000.safetensors", size_bytes)
    convert(source, out)
    assert hashes(out) == hashes(good)
    assert f"layer-000.safetensors: it has {size_bytes} bytes instead of 102400" in caplog.text


def test_damage_in_a_complete_layer_that_calibration_has_passed_is_mended(
    source: Path, tmp_path: Path
) -> None:
    recipe = make_recipe("2bit", calibrate="random", calibration_tokens=1024)
    first, out = tmp_path / "good", tmp_path / "out"
    convert_checkpoint(source, first, recipe)
    convert_checkpoint(source, out, recipe, ConvertOptions(part=(1, 3)))
    convert_checkpoint(source, out, recipe, ConvertOptions(part=(2, 3)))
    flip_in_layer(out, first, "last byte of expert 2")
    convert_checkpoint(source, out, recipe)
    assert hashes(out) == hashes(first)


def test_changed_bytes_of_an_expert_are_never_compressed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(source, whole, codec="zstd")
    original = LayerWriter.finish_zstd

    def changed(self: LayerWriter, written: list[str]) -> Any:
        flip(partial_path(self.path), self.offsets[1] + 7)
        return original(self, written)

    with monkeypatch.context() as patch:
        patch.setattr(LayerWriter, "finish_zstd", changed)
        with pytest.raises(
            OutputError, match="the bytes of expert 1 changed since they were written"
        ):
            convert(source, out, codec="zstd")
    convert(source, out, codec="zstd")
    assert hashes(out) == hashes(whole)


@pytest.mark.parametrize(
    ("layers", "recipe", "wanted"),
    [(12, {"solver": "hqq"}, 20), (6, {"calibrate": "random", "calibration_tokens": 1024}, 8)],
    ids=["hqq", "calibrated"],
)
def test_kills_at_random_moments_do_not_change_a_byte(
    tmp_path: Path, layers: int, recipe: dict[str, Any], wanted: int
) -> None:
    source, out, whole = tmp_path / "mini", tmp_path / "out", tmp_path / "whole"
    make_checkpoint(source, SHAPES["mini"], layers, shards=3)
    started = time.monotonic()
    convert_checkpoint(source, whole, make_recipe("2bit", **recipe))
    seconds = time.monotonic() - started
    server = subprocess.Popen(
        [
            sys.executable,
            SUPPORT / "conversion" / "kill_server.py",
            source,
            out,
            "2",
            json.dumps(recipe),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert server.stdin and server.stdout
    moments, kills = random.Random(0), 0

    def start() -> int:
        server.stdin.write("\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    try:
        while kills < wanted:
            pid = start()
            # Kill it at a random moment, unless it prints its status before.
            select.select([server.stdout], [], [], moments.uniform(0, seconds / 12))
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(pid, signal.SIGKILL)
            killed = int(server.stdout.readline()) == signal.SIGKILL
            kills += killed
            if not killed:  # begin anew, the kills go on
                assert hashes(out) == hashes(whole)
                for file in sorted(out.rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
        start()
        assert int(server.stdout.readline()) == 0
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()
    assert hashes(out) == hashes(whole)


@pytest.mark.parametrize("moment", [LayerRecord, ShardRecord])
def test_kill_between_renaming_a_file_and_recording_it_is_mended(
    source: Path,
    reference: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: type[Record],
) -> None:
    out = tmp_path / "out"
    original = Journal.append

    def append(self: Journal, record: Record) -> None:
        if isinstance(record, moment):
            raise Interruption
        original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(Interruption):
            convert(source, out)
    convert(source, out)
    assert hashes(out) == reference


def test_kill_before_the_index_is_mended(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "converter.conversion.completion.write_card",
            lambda *_: (_ for _ in ()).throw(Interruption),
        )
        with pytest.raises(Interruption):
            convert(source, out)
    assert (out / "trunk.safetensors").exists()
    convert(source, out)
    assert hashes(out) == reference


@pytest.mark.parametrize("recipe", ["3bit", "paper-2bit"])
def test_resume_by_another_recipe_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    before = hashes(out)
    with pytest.raises(OutputError, match=r"another recipe(?s:.*)--no-resume"):
        convert(source, out, recipe)
    assert hashes(out) == before


def test_resume_from_other_weights_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    make_checkpoint(tmp_path / "mini", SHAPES["mini"], 3, shards=2, seed=1)
    with pytest.raises(OutputError, match="another source"):
        convert(tmp_path / "mini", out)


def test_resume_by_another_code_version_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    monkeypatch.setattr("converter.conversion.identity.__version__", "99.0")
    with pytest.raises(OutputError, match="another code"):
        convert(source, out)


def test_no_resume_begins_again(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch, recipe="3bit")
    assert convert(source, out, resume=False) == "converted"
    assert hashes(out) == reference


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


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_ends_cleanly_and_is_resumed(
    source: Path, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    threads = (
        threading.active_count()
    )  # tqdm's monitor may run already: it stays once a model was loaded

    def progress(stage: str, done: int, total: int) -> None:
        if done > total / 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(
            source, out, make_recipe("2bit", solver="hqq"), ConvertOptions(2), progress
        )
    assert threading.active_count() == threads
    convert(source, out)
    assert hashes(out) == reference


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
