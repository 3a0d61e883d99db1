"""Conversions from the Hub: the bytes of a local one, within the disk limit, over any bad line."""

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import constants, snapshot_download
from inside import retry_quickly
from make_checkpoint import SHAPES, make_checkpoint
from project_paths import ROOT

from converter.checkpoint.shards.hub_model import HubModel
from converter.cli.main import main
from converter.convert import ConvertOptions, convert_checkpoint
from converter.output.output_folder import SOURCE_FOLDER
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import DoesNotFitError, HubError, OutputError, SourceError
from formats.hub.ranges import Retries
from formats.reading.verify import verify_folder

LAYERS, SHARDS = 12, 8
RECIPE = make_recipe("2bit", solver="hqq")
WEIGHTS = ("experts", "trunk.safetensors", "config.json", "tokenizer.json", "quality.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "mini"
    make_checkpoint(folder, SHAPES["mini"], LAYERS, shards=SHARDS)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted from the folder."""
    out = tmp_path_factory.mktemp("local") / "out"
    convert_checkpoint(source, out, RECIPE)
    return out


@pytest.fixture
def shard_bytes(source: Path) -> list[int]:
    return sorted(p.stat().st_size for p in source.glob("*.safetensors"))


@pytest.fixture
def filled(hub: HubServer, source: Path) -> HubServer:
    hub.add("me/mini", source)
    return hub


def convert(out: Path, recipe: Any = RECIPE, workers: int = 2, **options: Any) -> None:
    model = HubModel.open("me/mini", resume=out, **options)
    retry_quickly(model.repo, Retries(attempts=3, wait=lambda s: None))
    convert_checkpoint(model, out, recipe, ConvertOptions(max_workers=workers))


def weights_of(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in files
        if str(p.relative_to(folder)).startswith(WEIGHTS)
    }


def watch_disk(patch: pytest.MonkeyPatch, folder: Path) -> Callable[[], int]:
    """Return a function for the largest size of the fetched shards at any fsync, in bytes."""
    seen = [0]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        files = [p for p in (folder / SOURCE_FOLDER).rglob("*") if p.is_file()]
        with contextlib.suppress(FileNotFoundError):
            seen[0] = max(seen[0], sum(p.stat().st_size for p in files))
        real(descriptor)

    patch.setattr(os, "fsync", fsync)
    return lambda: seen[0]


def each_shard_once(hub: HubServer) -> None:
    """Check that each shard was sent at most once, except its header (twice, 64 KiB)."""
    for path in {
        r.path for r in hub.requests if r.path.endswith(".safetensors") and r.host == "cdn"
    }:
        ranges = hub.ranges(path)
        assert sum(end - begin for begin, end in ranges) <= max(end for _, end in ranges) + 2 * (
            64 << 10
        )


def two_shards(shard_bytes: list[int]) -> int:
    return sum(shard_bytes[-2:])


def test_a_limit_below_the_checkpoint_gives_the_same_bytes(
    filled: HubServer,
    local: Path,
    tmp_path: Path,
    shard_bytes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = two_shards(shard_bytes)
    assert limit < sum(shard_bytes) / 2
    largest = watch_disk(monkeypatch, tmp_path / "out")
    convert(tmp_path / "out", max_disk_bytes=limit)
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert 0 < largest() <= limit
    assert verify_folder(tmp_path / "out", read_data=True).problems == []
    assert not (tmp_path / "out" / SOURCE_FOLDER).exists()
    each_shard_once(filled)
    assert list((tmp_path / "hf-home").rglob("*.safetensors")) == []


def test_the_index_names_repository_commit_and_hashes(
    filled: HubServer, local: Path, tmp_path: Path
) -> None:
    convert(tmp_path / "out")
    ours, theirs = Artifact.open(tmp_path / "out").index.source, Artifact.open(local).index.source
    assert (ours.name, ours.revision) == ("me/mini", filled.head("me/mini").oid)
    assert ours.shards == theirs.shards
    assert (tmp_path / "out/LICENSE").read_text() == "Apache-2.0"


def test_nothing_is_kept_without_keep(
    filled: HubServer, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = watch_disk(monkeypatch, tmp_path / "out")
    convert(tmp_path / "out", keep=False)
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert largest() == 0


def test_shards_in_the_cache_are_used_in_place_and_stay(
    filled: HubServer, local: Path, tmp_path: Path
) -> None:
    folder = Path(snapshot_download("me/mini"))
    before = {p.name: p.resolve() for p in folder.iterdir()}
    filled.requests.clear()
    convert(tmp_path / "out")
    assert filled.served() == 0
    assert {p.name: p.resolve(strict=True) for p in folder.iterdir()} == before
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_a_part_of_the_shards_in_the_cache_is_used(
    filled: HubServer, local: Path, tmp_path: Path
) -> None:
    name = f"model-00002-of-0000{SHARDS}.safetensors"
    snapshot_download("me/mini", allow_patterns=name)
    filled.requests.clear()
    convert(tmp_path / "out")
    assert filled.served(name) == 0
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_a_damaged_shard_in_the_cache_is_named(filled: HubServer, tmp_path: Path) -> None:
    folder = Path(snapshot_download("me/mini"))
    blob = next(folder.glob("model-00003*")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(SourceError, match="the cache is damaged") as caught:
        convert(tmp_path / "out")
    assert str(blob) in caught.value.hint
    assert not (tmp_path / "out/moe_index.json").exists()


def test_offline_a_cached_checkpoint_is_converted_without_a_request(
    filled: HubServer, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download("me/mini")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    filled.requests.clear()
    convert(tmp_path / "out")
    assert filled.requests == []
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert Artifact.open(tmp_path / "out").index.source.revision == filled.head("me/mini").oid


def test_main_may_move_meanwhile(filled: HubServer, local: Path, tmp_path: Path) -> None:
    pinned = filled.head("me/mini").oid
    filled.faults.before(
        "model-00002",
        lambda: filled.commit("me/mini", {"config.json": b"{}", "tokenizer.json": b""}),
    )
    convert(tmp_path / "out")
    assert filled.head("me/mini").oid != pinned
    assert Artifact.open(tmp_path / "out").index.source.revision == pinned
    assert weights_of(tmp_path / "out") == weights_of(local)


@pytest.mark.parametrize("fault", ["drop", "short", "ignore_range", "shift", "damage"])
def test_a_fault_on_the_way_changes_no_byte(
    filled: HubServer, local: Path, tmp_path: Path, fault: str
) -> None:
    numbers = {"drop": {"after": 1000}, "damage": {"at": 100_000}}.get(fault, {})
    model = HubModel.open("me/mini")
    for name in model.repo.files:
        getattr(filled.faults, fault)(name, times=1, **numbers)
    convert(tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_a_shard_that_stays_damaged_is_refused_and_costs_nothing_else(
    filled: HubServer, local: Path, tmp_path: Path
) -> None:
    filled.faults.damage("model-00004", at=100_000, times=-1)
    with pytest.raises(SourceError, match="fetched twice") as caught:
        convert(tmp_path / "out")
    assert "model-00004" in caught.value.message
    assert not (tmp_path / "out/moe_index.json").exists()
    filled.faults.clear()
    convert(tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_a_resume_goes_on_in_the_middle_of_a_shard_at_the_same_commit(
    filled: HubServer, local: Path, tmp_path: Path, shard_bytes: list[int]
) -> None:
    limit = two_shards(shard_bytes)
    pinned = filled.head("me/mini").oid
    name = "model-00003"
    filled.faults.drop(name, after=70_000, times=-1)
    with pytest.raises(HubError, match="gave up"):
        convert(tmp_path / "out", max_disk_bytes=limit)
    filled.faults.clear()
    kept = {p.name: p.stat().st_size for p in (tmp_path / "out" / SOURCE_FOLDER).iterdir()}
    partial = [size for file, size in kept.items() if file.endswith(".partial")]
    assert partial
    filled.commit("me/mini", {"config.json": b"broken"})
    filled.requests.clear()
    convert(tmp_path / "out", max_disk_bytes=limit)
    begins = [begin for begin, _ in filled.ranges(name)]
    assert min(begin for begin in begins if begin) in partial
    assert filled.served("model-00001") <= 2 * (64 << 10)
    assert weights_of(tmp_path / "out") == weights_of(local)
    assert Artifact.open(tmp_path / "out").index.source.revision == pinned


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended_goes_on_when_run_again(
    filled: HubServer, local: Path, tmp_path: Path, kill: signal.Signals
) -> None:
    command = [
        sys.executable,
        "-m",
        "converter",
        "convert",
        "me/mini",
        "-o",
        str(tmp_path / "out"),
        "--solver",
        "hqq",
    ]
    process: list[subprocess.Popen[bytes]] = []
    started, asked = threading.Event(), itertools.count(1)

    def end() -> None:
        # Two requests of the fifth shard are for its header: its address, and the bytes.
        if next(asked) == 3:
            started.wait(60)
            process[0].send_signal(kill)

    filled.faults.before("model-00005", end, times=-1)
    process.append(
        subprocess.Popen(command, env=os.environ | filled.environ(tmp_path / "hf-home"), cwd=ROOT)
    )
    started.set()
    assert process[0].wait(60) == (-kill if kill == signal.SIGKILL else 130)
    filled.faults.clear()
    assert not (tmp_path / "out/moe_index.json").exists()
    convert(tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_another_revision_in_the_same_folder_is_refused(filled: HubServer, tmp_path: Path) -> None:
    filled.faults.drop("model-00003", after=70_000, times=-1)
    with pytest.raises(HubError):
        convert(tmp_path / "out")
    filled.faults.clear()
    filled.commit("me/mini", {"README.md": b"new"})
    with pytest.raises(OutputError, match="another hub"):
        convert(tmp_path / "out", revision=filled.head("me/mini").oid)


def test_a_full_disk_is_said_and_the_run_goes_on_later(
    filled: HubServer, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = itertools.count(1)

    def fsync(descriptor: int) -> None:
        if SOURCE_FOLDER in os.readlink(f"/proc/self/fd/{descriptor}") and next(shards) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DoesNotFitError, match="no space left in"):
        convert(tmp_path / "out", workers=1)
    monkeypatch.undo()
    filled.connect(tmp_path / "hf-home", monkeypatch)
    convert(tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(local)


def test_a_limit_that_no_expert_fits_has_both_numbers(
    filled: HubServer, tmp_path: Path, shard_bytes: list[int]
) -> None:
    with pytest.raises(DoesNotFitError, match="--max-disk 5000") as caught:
        convert(tmp_path / "out", max_disk_bytes=5000)
    assert "--no-keep" in caught.value.hint


def test_a_limit_beyond_the_disk_is_refused(filled: HubServer, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="bytes more, free are") as caught:
        convert(tmp_path / "out", max_disk_bytes=10**18)
    assert "--max-disk" in caught.value.hint


def test_calibration_reads_whole_layers_within_the_limit(
    filled: HubServer,
    source: Path,
    tmp_path: Path,
    shard_bytes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe("2bit", calibrate="random", calibration_tokens=1024)
    convert_checkpoint(source, tmp_path / "local", recipe)
    limit = two_shards(shard_bytes)
    largest = watch_disk(monkeypatch, tmp_path / "out")
    convert(tmp_path / "out", recipe, max_disk_bytes=limit)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    assert 0 < largest() <= limit
    each_shard_once(filled)


def test_a_complete_conversion_is_compared_without_fetching(
    filled: HubServer, tmp_path: Path
) -> None:
    convert(tmp_path / "out")
    filled.requests.clear()
    # It also needs no disk space for shards.
    convert(tmp_path / "out", max_disk_bytes=10**18)
    assert filled.served(".safetensors") <= SHARDS * (64 << 10)


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    return int(exit_.value.code or 0)


def test_the_command_takes_a_repository(
    filled: HubServer,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("convert", "me/mini", "--solver", "hqq", "--dry-run", "--json") == 0
    assert filled.head("me/mini").oid in capsys.readouterr().out
    assert not (tmp_path / "mini-2bit").exists()
    assert call("convert", "me/mini", "--solver", "hqq", "--max-disk", "30MB") == 0
    assert weights_of(tmp_path / "mini-2bit") == weights_of(local)


def test_a_private_repository_needs_the_token_and_never_shows_it(
    hub: HubServer,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.add("me/mini", source, private=True)
    monkeypatch.delenv("HF_TOKEN")
    assert call("convert", "me/mini", "-o", tmp_path / "out") == 1
    assert "hf auth login" in capfd.readouterr().err
    assert (
        call(
            "convert", "me/mini", "-o", tmp_path / "out", "--token", TOKEN, "--solver", "hqq", "-v"
        )
        == 0
    )
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert not any(r.token for r in hub.requests if r.host == "cdn")
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()


def test_options_of_the_hub_are_refused_for_a_folder(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("convert", source, "--revision", "main") == 2
    assert "--revision: only for a repository" in capsys.readouterr().err
