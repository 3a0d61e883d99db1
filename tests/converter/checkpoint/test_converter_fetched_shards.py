"""Shards on disk: those needed next, never more than the limit, each verified."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from inside import inside

from converter.checkpoint.shards.fetched_shards import FetchedShards
from converter.checkpoint.shards.shard_source import ShardNeed, Stopped
from converter.journal.keys import ExpertKey
from formats.errors import DoesNotFitError, HubError
from formats.hub.ranges import Retries
from formats.hub.repo import HubRepo

SIZE = 1000
FILES = {name: bytes([i]) * SIZE for i, name in enumerate("ABCDE")}


@pytest.fixture
def repo(hub: HubServer) -> HubRepo:
    hub.add("me/model", {f"{name}.safetensors": data for name, data in FILES.items()})
    return HubRepo.open("me/model", retries=Retries(attempts=2, wait=lambda s: None))


class Store:
    """A FetchedShards with room for `shards` of them."""

    def __init__(self, repo: HubRepo, folder: Path, shards: int) -> None:
        self.folder, self.stop = folder, threading.Event()
        self.fetched = FetchedShards(repo, folder, shards * SIZE, self.stop)

    def expect(self, *needs: str) -> None:
        self.fetched.expect(
            ShardNeed(ExpertKey(0, i), frozenset(f"{n}.safetensors" for n in names))
            for i, names in enumerate(needs)
        )

    def read(self, name: str) -> bytes:
        with self.fetched.hold(f"{name}.safetensors") as descriptor:
            assert _size_of(self.folder) <= inside(self.fetched, "max_bytes")
            # At a place of its own: several threads hold the same descriptor.
            return os.pread(descriptor, SIZE + 1, 0)

    def work(self, position: int, names: str) -> None:
        for name in names:
            assert self.read(name) == FILES[name]
        self.done(position)

    def done(self, position: int) -> None:
        self.fetched.done(ExpertKey(0, position))


def _size_of(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        # The other threads go on meanwhile.
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@pytest.fixture
def stores() -> Iterator[list[Store]]:
    made: list[Store] = []
    yield made
    for store in made:
        store.fetched.close()


def served(hub: HubServer) -> str:
    """The names of the shards that were sent, in order."""
    return "".join(r.path[-13] for r in hub.requests if r.end > r.begin)


def test_shards_come_in_the_order_of_need_and_go_when_done(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    stores.append(store := Store(repo, tmp_path / "s", 2))
    needs = ("AB", "BC", "CD", "DE")
    store.expect(*needs)
    for position, names in enumerate(needs):
        store.work(position, names)
    assert sorted(served(hub)) == list("ABCDE")
    assert list((tmp_path / "s").iterdir()) == []


def test_what_is_needed_later_makes_room(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    stores.append(store := Store(repo, tmp_path / "s", 2))
    needs = ("AB", "BC", "CA")
    store.expect(*needs)
    for position, names in enumerate(needs):
        store.work(position, names)
    assert sorted(served(hub)) == list("AABC")


def test_workers_that_need_different_shards_all_get_on(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    stores.append(store := Store(repo, tmp_path / "s", 2))
    needs = ("AB", "BC", "CD", "DE", "EA", "AC")
    store.expect(*needs)
    errors: list[BaseException] = []

    def run(positions: range) -> None:
        try:
            for position in positions:
                for _ in range(20):
                    for name in needs[position]:
                        assert store.read(name) == FILES[name]
                store.done(position)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(range(i, len(needs), 2),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    # Later work waits; it does not evict shards that earlier work still reads.
    assert len(served(hub)) <= len("ABCDEAC")


def test_a_read_beyond_what_was_expected_is_served(
    repo: HubRepo, tmp_path: Path, stores: list[Store]
) -> None:
    stores.append(store := Store(repo, tmp_path / "s", 1))
    store.expect("A")
    assert store.read("D") == FILES["D"]
    store.work(0, "A")
    assert list((tmp_path / "s").iterdir()) == []


def test_what_an_earlier_run_left_is_used_or_deleted(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    etags = {name: repo.file(f"{name}.safetensors").etag for name in FILES}
    (folder / etags["A"]).write_bytes(FILES["A"])
    (folder / f"{etags['B']}.partial").write_bytes(FILES["B"][:300])
    (folder / f"{etags['C']}.partial").write_bytes(b"x" * 300)
    (folder / etags["E"]).write_bytes(FILES["E"])
    stores.append(store := Store(repo, folder, 3))
    store.expect("A", "B", "C")
    assert not (folder / etags["E"]).exists()
    for position, name in enumerate("ABC"):
        store.work(position, name)
    assert hub.ranges("B.safetensors") == [(300, SIZE)]
    assert hub.ranges("C.safetensors") == [(300, SIZE), (0, SIZE)]
    assert hub.served("A.safetensors") == 0


def test_shard_that_changed_on_disk_since_an_earlier_run_is_fetched_again(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    stores.append(store := Store(repo, tmp_path / "s", 2))
    store.folder.mkdir()
    shard = store.folder / repo.file("A.safetensors").etag
    shard.write_bytes(FILES["A"][:-1] + b"!")
    store.expect("A")
    store.work(0, "A")
    assert served(hub) == "A"


def test_a_failure_reaches_every_waiter(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    hub.faults.drop("A.safetensors", times=-1)
    stores.append(store := Store(repo, tmp_path / "s", 1))
    store.expect("A", "B")
    for _ in range(2):
        with pytest.raises(HubError, match=r"A\.safetensors"):
            store.read("A")


def test_a_waiter_ends_when_stopped(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    stores.append(store := Store(repo, tmp_path / "s", 1))
    hub.faults.before("A.safetensors", store.stop.set)
    store.expect("A")
    with pytest.raises(Stopped):
        store.read("A")


def test_less_room_than_one_piece_of_work_needs_is_refused(repo: HubRepo, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="2 shards are needed at once, 2000 bytes"):
        Store(repo, tmp_path / "s", 1).expect("A", "BC")


def test_other_work_may_be_expected_later_and_what_it_does_not_need_goes(
    repo: HubRepo, hub: HubServer, tmp_path: Path, stores: list[Store]
) -> None:
    stores.append(store := Store(repo, tmp_path / "s", 2))
    store.expect("A", "B", "C")
    store.work(0, "A")
    store.work(1, "B")
    store.expect("A", "C")
    store.work(0, "A")
    store.work(1, "C")
    assert "".join(sorted(set(served(hub)))) == "ABC"
    assert not list((tmp_path / "s").iterdir())
