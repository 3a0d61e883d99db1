"""Interrupted conversions: a resume gives the same bytes, or a refusal names the next step."""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import (
    Interruption,
    convert,
    converted_experts,
    flip,
    hashes,
    interrupted,
)
from make_checkpoint import SHAPES, make_checkpoint
from project_paths import ROOT, SUPPORT

from converter.convert import ConvertOptions, convert_checkpoint
from converter.journal.journal_file import Journal
from converter.journal.records import LayerRecord, Record, ShardRecord
from converter.recipe.recipes import make_recipe
from formats.errors import NotConvertedError, OutputError
from formats.index import read_index
from formats.layer_file import compression_paths
from formats.reading.verify import verify_folder


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
    asked, answered = server.stdin, server.stdout
    assert asked and answered
    moments, kills = random.Random(0), 0

    def start() -> int:
        asked.write("\n")
        asked.flush()
        return int(answered.readline())

    try:
        while kills < wanted:
            pid = start()
            # Kill it at a random moment, unless it prints its status before.
            select.select([answered], [], [], moments.uniform(0, seconds / 12))
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(pid, signal.SIGKILL)
            killed = int(answered.readline()) == signal.SIGKILL
            kills += killed
            if not killed:  # begin anew, the kills go on
                assert hashes(out) == hashes(whole)
                for file in sorted(out.rglob("*"), reverse=True):
                    file.rmdir() if file.is_dir() else file.unlink()
        start()
        assert int(answered.readline()) == 0
    finally:
        asked.close()
        server.wait()
        answered.close()
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


def test_a_recipe_resumes_under_its_other_name_to_the_same_weights(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch)
    seen = converted_experts(monkeypatch, lambda: convert(source, out, "2bit-scalar"))
    assert len(seen) == 3 * 4 - 5
    assert read_index(out).recipe.name == "2bit-scalar"
    named = {"moe_index.json", "config.json", "README.md"}
    assert {k: v for k, v in hashes(out).items() if k not in named} == {
        k: v for k, v in reference.items() if k not in named
    }
    assert not verify_folder(out).problems
    assert convert(source, out, "2bit") == "already complete"


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
