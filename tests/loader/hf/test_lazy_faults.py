"""Lazy downloads from a Hub that fails, changes, or is offline."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from inside import inside
from lazy_repository import REPO, expected, experts_of, filled, local, open_lazy

from formats.artifact import Artifact
from formats.errors import (
    DamageError,
    DoesNotFitError,
    HubError,
)
from formats.hub.lazy_folder import LazyFolder
from formats.hub.lazy_reader import HubReader
from formats.hub.ranges import Retries
from formats.reading.verify import verify_folder

__all__ = ["expected", "filled", "local"]


def test_a_reader_that_is_closed_while_the_hub_fails_asks_no_more(filled: HubServer) -> None:
    lazy = LazyFolder.open(REPO)
    asked = threading.Event()
    filled.faults.status(503, "layer-000", times=-1)
    filled.faults.before("layer-000", asked.set, times=-1)
    reader = HubReader(lazy, fill=False)
    with ThreadPoolExecutor(1) as pool:
        blob = pool.submit(reader.read, 0, 0)
        assert asked.wait(60)
        reader.stop()
        with pytest.raises(HubError, match="not tried again"):
            blob.result(60)
    reader.close()


def test_a_reader_whose_filling_thread_fails_goes_on_without(
    filled: HubServer, expected: Callable[[int, int], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HubReader, "_fill", lambda self: 1 // 0)
    with HubReader(open_lazy()) as reader:
        assert torch.equal(reader.read(0, 0), expected(0, 0))


@pytest.mark.parametrize("fault", ["drop", "short", "ignore_range", "shift", "damage"])
def test_a_bad_line_gives_the_right_bytes(
    filled: HubServer, local: Path, fault: str, expected: Callable[[int, int], torch.Tensor]
) -> None:
    for name in filled.head(REPO).files:
        getattr(filled.faults, fault)(
            name, **({"at": 300} if fault == "damage" and "layer" not in name else {})
        )
    if fault == "damage":
        # A damaged index or header is refused. Only the trunk's and the experts' bytes have hashes.
        filled.faults.clear()
        filled.faults.damage("trunk", at=9000)
    lazy = open_lazy()
    with HubReader(lazy, fill=False) as reader:
        for n in range(len(lazy.artifact.index.layers)):
            arguments = (
                {"after": 5000} if fault == "drop" else {"at": 77} if fault == "damage" else {}
            )
            getattr(filled.faults, fault)(f"layer-{n:03d}", **arguments)
        for key in experts_of(local):
            assert torch.equal(reader.read(*key), expected(*key))
    assert verify_folder(lazy.path, read_data=True).problems == []


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_tried_again(
    filled: HubServer, status: int, expected: Callable[[int, int], torch.Tensor]
) -> None:
    for part in ("/api/models", "trunk", "layer-001"):
        filled.faults.status(status, part, Retry_After="1")
    with HubReader(open_lazy(), fill=False) as reader:
        filled.faults.status(status, "layer-001", Retry_After="1")
        assert torch.equal(reader.read(1, 0), expected(1, 0))


def test_a_changed_file_is_an_error_and_downloaded_files_stay(
    filled: HubServer, expected: Callable[[int, int], torch.Tensor]
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        reader.read(0, 0)
        inside(inside(inside(reader, "folder").repo, "reader"), "locations").clear()
        filled.faults.change_etag("layer-001")
        with pytest.raises(HubError, match="ETag"):
            reader.read(1, 0)
        assert torch.equal(reader.read(0, 0), expected(0, 0))
        assert torch.equal(reader.read(1, 0), expected(1, 0))


def test_main_may_move_meanwhile(
    filled: HubServer,
    converted: Callable[[str], Path],
    expected: Callable[[int, int], torch.Tensor],
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        other = converted("3bit")
        filled.commit(REPO, {str(p.relative_to(other)): p for p in other.rglob("*") if p.is_file()})
        assert torch.equal(reader.read(1, 1), expected(1, 1))
    assert open_lazy().path.name == filled.head(REPO).oid != reader.artifact.folder.name


def test_damage_in_the_repository_is_an_error_and_is_not_recorded(
    hub: HubServer, converted_copy: Path, expected: Callable[[int, int], torch.Tensor]
) -> None:
    entry = Artifact.open(converted_copy).entry(1, 2)
    with open(converted_copy / "experts/layer-001.safetensors", "r+b") as f:
        f.seek(entry.offset + 10)
        byte = f.read(1)
        f.seek(entry.offset + 10)
        f.write(bytes([byte[0] ^ 1]))
    hub.add(REPO, converted_copy)
    lazy = open_lazy()
    with HubReader(lazy, fill=False) as reader:
        for _ in range(2):
            with pytest.raises(
                DamageError, match=f"layer 1 expert 2 at offset {entry.offset}: the sha256"
            ):
                reader.read(1, 2)
        assert torch.equal(reader.read(1, 1), expected(1, 1))
    assert not lazy.has(1, 2)
    assert lazy.has(1, 1)


def test_a_trunk_of_another_hash_is_refused(filled: HubServer) -> None:
    filled.faults.damage("trunk", at=9000, times=-1)
    with pytest.raises(DamageError, match=r"trunk\.safetensors: its sha256"):
        open_lazy()


def test_a_broken_start_goes_on_with_the_trunk(filled: HubServer, local: Path) -> None:
    half = (local / "trunk.safetensors").stat().st_size // 2
    filled.faults.drop("trunk", after=half, times=1)
    filled.faults.status(503, "trunk.safetensors", times=-1)
    with pytest.raises(HubError):
        LazyFolder.open(REPO, retries=Retries(attempts=1))
    filled.faults.clear()
    filled.requests.clear()
    open_lazy()
    header_bytes = Artifact.open(local).trunk_header().data_offset
    assert filled.served("trunk") <= (local / "trunk.safetensors").stat().st_size + header_bytes


def test_a_closing_reader_does_not_wait_for_a_busy_hub(filled: HubServer) -> None:
    lazy = LazyFolder.open(REPO)
    filled.faults.status(429, "layer-", times=-1, Retry_After="250")
    reader = HubReader(lazy)
    reader.close()
    assert not inside(reader, "thread").is_alive()


def test_offline_downloaded_experts_can_be_used(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch, expected: Callable[[int, int], torch.Tensor]
) -> None:
    with HubReader(open_lazy(), fill=False) as reader:
        reader.read(0, 0)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with HubReader(open_lazy(), fill=False) as reader:
        assert torch.equal(reader.read(0, 0), expected(0, 0))
        with pytest.raises(HubError, match="offline"):
            reader.read(0, 1)
    with pytest.raises(HubError, match="offline"):
        LazyFolder.open("me/never-seen")


def test_no_room_for_the_model_is_said_before_it_is_fetched(
    filled: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DoesNotFitError, match="only 1 are free"):
        open_lazy()
