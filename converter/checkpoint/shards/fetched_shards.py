"""Shards of a Hub repository on disk while they are needed: fetched ahead, verified, deleted."""

import contextlib
import logging
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path

from converter.checkpoint.shards.shard_download import fetch_shard
from converter.checkpoint.shards.shard_source import ShardNeed, Stopped
from converter.journal.keys import UnitKey
from formats.errors import DoesNotFitError
from formats.files.io_errors import io_error, translated
from formats.files.output_file import make_folder, remove, rename
from formats.files.partial_file import partial_path
from formats.hub.repo import HubRepo

_CONNECTIONS = 2
_POLL_S = 0.2
_OUR_NAMES = re.compile("([0-9a-f]{40}|[0-9a-f]{64})(\\.partial)?")
"""A shard's file is named by the Hub's hash of it."""

_log = logging.getLogger(__name__)


class FetchedShards:
    """At most `max_bytes` of shards in `folder`, which this object owns; threads fetch ahead.

    A shard gets its name, the Hub's hash, only after it was compared with that hash. Shards of an
    earlier run are compared again and used; partial ones are completed. A shard is deleted when no
    expected work needs it. A shard that is needed sooner evicts one that is needed later, so the
    earliest work always proceeds if the limit covers the shards of one unit.
    """

    def __init__(self, repo: HubRepo, folder: Path, max_bytes: int, stop: threading.Event) -> None:
        self._repo = repo
        self._folder = folder
        self._max_bytes = max_bytes
        self._stop = stop
        self._needs: list[ShardNeed] = []
        self._positions: dict[UnitKey, int] = {}
        self._needed_at: dict[str, set[int]] = {}
        """Shard -> positions in `_needs` of the work that still needs it."""
        self._descriptors: dict[str, int] = {}
        """Shard on disk -> its open file."""
        self._fetching: set[str] = set()
        self._waiting: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def expect(self, needs: Iterable[ShardNeed]) -> None:
        """Begin to fetch the shards of this work, in its order; replaces the work expected before.

        DoesNotFitError if one unit needs more than the limit.
        """
        with self._changed:
            self._plan(list(needs))
            for name in list(self._descriptors):
                self._drop_if_idle(name)
            self._changed.notify_all()
        if self._threads:
            return
        make_folder(self._folder)
        self._adopt_files()
        for _ in range(_CONNECTIONS):
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()

    def done(self, key: UnitKey) -> None:
        """Report finished work; shards that only it needed are deleted."""
        with self._changed:
            position = self._positions.get(key)
            if position is None:
                return
            for name in self._needs[position].shards:
                self._needed_at[name].discard(position)
                self._drop_if_idle(name)
            self._changed.notify_all()

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[int]:
        """Wait for a shard; yield its file descriptor. The shard stays on disk in this context.

        Raises the error that ended fetching, or Stopped.
        """
        with self._changed:
            self._waiting[name] += 1
            self._changed.notify_all()
            try:
                while name not in self._descriptors:
                    if self._error:
                        raise self._error
                    is_fetched = any(thread.is_alive() for thread in self._threads)
                    if self._stop.is_set() or not is_fetched:
                        raise Stopped
                    self._changed.wait(_POLL_S)
                self._held[name] += 1
            finally:
                self._waiting[name] -= 1
        try:
            yield self._descriptors[name]
        finally:
            with self._changed:
                self._held[name] -= 1
                self._drop_if_idle(name)
                self._changed.notify_all()

    def close(self) -> None:
        """End the threads; the files stay on disk for a resume."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _plan(self, needs: list[ShardNeed]) -> None:
        self._needs = needs
        self._positions.clear()
        self._needed_at.clear()
        for position, need in enumerate(needs):
            self._positions[need.key] = position
            for name in need.shards:
                self._needed_at.setdefault(name, set()).add(position)
            size_bytes = self._size_bytes(need.shards)
            if size_bytes > self._max_bytes:
                raise DoesNotFitError(
                    f"--max-disk {self._max_bytes}: {len(need.shards)} shards are needed at once,"
                    f" {size_bytes} bytes",
                    f"allow {size_bytes}, or add --no-keep to read without keeping anything",
                )

    def _size_bytes(self, names: Iterable[str]) -> int:
        return sum(self._repo.file(name).size for name in names)

    def _rank(self, name: str) -> float:
        """Return the position of the first work that needs the shard; inf if none does.

        -1 if somebody reads it now without having announced it, as a resumed calibration does.
        """
        is_read = self._waiting[name] or self._held[name]
        return min(self._needed_at.get(name, ()), default=-1 if is_read else inf)

    def _drop_if_idle(self, name: str) -> None:
        if name in self._descriptors and self._rank(name) == inf:
            self._drop(name)

    def _drop(self, name: str) -> None:
        os.close(self._descriptors.pop(name))
        remove(self._path(name))
        _log.info("deleted %s", name)

    def _path(self, name: str) -> Path:
        return self._folder / self._repo.file(name).etag

    def _adopt_files(self) -> None:
        """Keep an earlier run's shards that this run needs first; delete its other shards."""
        paths = {self._path(name): name for name in self._first_needed()}
        for path in sorted(self._folder.iterdir()):
            name = paths.get(path.with_suffix(""))
            if name is None:
                # A file with another kind of name is a stranger's and stays.
                if _OUR_NAMES.fullmatch(path.name) and not path.is_symlink():
                    remove(path)
            elif path.suffix == "" and _size_of(path) == self._repo.file(name).size:
                # Its bytes may have changed: as a partial file it is compared again.
                rename(path, partial_path(path))

    def _first_needed(self) -> list[str]:
        """Return the shards that fit in the limit, in the order of need."""
        names = []
        free_bytes = self._max_bytes
        for name in sorted(self._needed_at, key=self._rank):
            free_bytes -= self._repo.file(name).size
            if free_bytes < 0:
                break
            names.append(name)
        return names

    def _work(self) -> None:
        """Fetch one shard after the other, until stopped or failed."""
        try:
            while not self._stop.is_set():
                with self._changed:
                    name = None if self._error else self._choose()
                    if name is None:
                        self._changed.wait(_POLL_S)
                        continue
                    self._fetching.add(name)
                try:
                    self._fetch(name)
                finally:
                    with self._changed:
                        self._fetching.discard(name)
                        self._changed.notify_all()
        except Stopped:
            pass
        except DoesNotFitError as e:
            hint = "lower --max-disk, or free space, and run the same command again"
            self._fail(DoesNotFitError(e.message, hint))
        except OSError as e:
            self._fail(io_error(e, self._folder, "used"))
        except Exception as e:
            self._fail(e)

    def _choose(self) -> str | None:
        """Return the shard to fetch next, after evicting others for it; None if none fits now."""
        present = self._descriptors.keys() | self._fetching
        absent = (self._needed_at.keys() | self._waiting.keys()) - present
        name = min(absent, key=lambda n: (self._rank(n), n), default=None)
        if name is None or (rank := self._rank(name)) == inf:
            return None
        free_bytes = self._max_bytes - self._size_bytes(present) - self._repo.file(name).size
        victims = []
        for other in sorted(self._descriptors, key=self._rank, reverse=True):
            if free_bytes >= 0:
                break
            if self._rank(other) > rank and not self._held[other] and not self._waiting[other]:
                victims.append(other)
                free_bytes += self._repo.file(other).size
        if free_bytes < 0:
            return None
        for victim in victims:
            self._drop(victim)
        return name

    def _fetch(self, name: str) -> None:
        path = self._path(name)
        fetch_shard(self._repo, name, path, self._check_stop)
        with self._changed:
            self._descriptors[name] = _open(path)
            self._drop_if_idle(name)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _open(path: Path) -> int:
    with translated(path, "read"):
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _size_of(path: Path) -> int:
    """Return the size of a regular file in bytes; -1 for a link and anything else."""
    with translated(path, "read"):
        status = path.lstat()
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
