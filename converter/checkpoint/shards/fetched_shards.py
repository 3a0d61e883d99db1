"""Shards of a Hub repository on disk while they are needed, within a limit; fetched ahead,
verified, deleted.
"""

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

from converter.checkpoint.shards.shard_source import ShardNeed, Stopped
from converter.journal.keys import UnitKey
from formats.errors import DoesNotFitError, SourceError
from formats.files.io_errors import io_error, translated
from formats.files.output_file import OutputFile, make_folder, remove, rename
from formats.hub.repo import HubRepo

_CONNECTIONS = 2
_LOOK_EVERY_S = 0.2
_OURS = re.compile("([0-9a-f]{40}|[0-9a-f]{64})(\\.partial)?")
"""The names of shards here: the Hub's hashes."""

_log = logging.getLogger(__name__)


class FetchedShards:
    """Keeps at most `max_bytes` of shards in `folder`, which it owns; threads fetch what is needed
    next.

    Each shard is compared with the Hub's hash before it gets its name, which is that hash. What an
    earlier run fetched is compared again and used, and what it fetched in part is completed. A
    shard goes when no expected work needs it any more. One that is needed sooner takes the place of
    one that is needed later; so the earliest work always gets on, if the limit has room for what
    one piece of work needs.
    """

    def __init__(self, repo: HubRepo, folder: Path, max_bytes: int, stop: threading.Event) -> None:
        self._repo, self._folder, self._max_bytes, self._stop = repo, folder, max_bytes, stop
        self._needs: list[ShardNeed] = []
        self._left: dict[str, set[int]] = {}
        self._positions: dict[UnitKey, int] = {}
        self._files: dict[str, int] = {}
        self._fetching: set[str] = set()
        self._wanted: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def expect(self, needs: Iterable[ShardNeed]) -> None:
        """Begins to fetch what the work needs, in its order, instead of what was expected before.
        DoesNotFitError if the limit is less than one piece's.
        """
        with self._changed:
            self._plan(list(needs))
            for name in list(self._files):
                self._drop_if_idle(name)
            self._changed.notify_all()
        if self._threads:
            return
        make_folder(self._folder)
        self._take_over()
        for _ in range(_CONNECTIONS):
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _plan(self, needs: list[ShardNeed]) -> None:
        self._needs = needs
        self._positions.clear()
        self._left.clear()
        for position, need in enumerate(self._needs):
            self._positions[need.key] = position
            for name in need.shards:
                self._left.setdefault(name, set()).add(position)
            if (size := self._size(need.shards)) > self._max_bytes:
                raise DoesNotFitError(
                    f"--max-disk {self._max_bytes}: {len(need.shards)} shards are needed at once, {size} bytes",
                    f"allow {size}, or add --no-keep to read without keeping anything",
                )

    def done(self, key: UnitKey) -> None:
        """The work is done; shards that were needed for it alone are deleted."""
        with self._changed:
            position = self._positions.get(key)
            if position is None:
                return
            for name in self._needs[position].shards:
                self._left[name].discard(position)
                self._drop_if_idle(name)
            self._changed.notify_all()

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[int]:
        """The open shard, which stays on disk meanwhile. Waits for it; raises what fetching raised,
        or Stopped.
        """
        with self._changed:
            self._wanted[name] += 1
            self._changed.notify_all()
            try:
                while name not in self._files:
                    if self._error:
                        raise self._error
                    if self._stop.is_set() or not any(
                        thread.is_alive() for thread in self._threads
                    ):
                        raise Stopped
                    self._changed.wait(_LOOK_EVERY_S)
                self._held[name] += 1
            finally:
                self._wanted[name] -= 1
        try:
            yield self._files[name]
        finally:
            with self._changed:
                self._held[name] -= 1
                self._drop_if_idle(name)
                self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads; what is on disk stays, for a resume."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _size(self, names: Iterable[str]) -> int:
        return sum(self._repo.file(name).size for name in names)

    def _rank(self, name: str) -> float:
        """The first work that needs it; -1 if it is read beyond what was expected (a resumed
        calibration does).
        """
        beyond = -1 if self._wanted[name] or self._held[name] else inf
        return min(self._left.get(name, ()), default=beyond)

    def _drop_if_idle(self, name: str) -> None:
        if name in self._files and self._rank(name) == inf:
            self._drop(name)

    def _drop(self, name: str) -> None:
        os.close(self._files.pop(name))
        remove(self._path(name))
        _log.info("deleted %s", name)

    def _path(self, name: str) -> Path:
        return self._folder / self._repo.file(name).etag

    def _take_over(self) -> None:
        """Keeps what an earlier run left and this one will need first; other shards in the folder
        are deleted.
        """
        kept, room = set(), self._max_bytes
        for name in sorted(self._left, key=self._rank):
            if (room := room - self._repo.file(name).size) < 0:
                break
            kept.add(name)
        paths = {self._path(name): name for name in kept}
        for path in sorted(self._folder.iterdir()):
            kept_name = paths.get(path.with_suffix(""))
            if kept_name is None:
                # What has no name of ours is a stranger's, and stays.
                if _OURS.fullmatch(path.name) and not path.is_symlink():
                    remove(path)
            elif path.suffix == "" and _size_of(path) == self._repo.file(kept_name).size:
                # The bytes may have changed since: they are compared like those of a shard fetched
                # in part.
                rename(path, path.with_suffix(".partial"))

    def _work(self) -> None:
        """Fetches what is to be had next, until stopped or failed."""
        try:
            while not self._stop.is_set():
                with self._changed:
                    name = None if self._error else self._choose()
                    if name is None:
                        self._changed.wait(_LOOK_EVERY_S)
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
            self._fail(
                DoesNotFitError(
                    e.message, "lower --max-disk, or free space, and run the same command again"
                )
            )
        except OSError as e:
            self._fail(io_error(e, self._folder, "used"))
        except Exception as e:
            self._fail(e)

    def _choose(self) -> str | None:
        """The shard to fetch next, with room made for it; None if there is none or no room that may
        be made.
        """
        absent = [
            n
            for n in {*self._left, *self._wanted}
            if n not in self._files and n not in self._fetching
        ]
        name = min(absent, key=lambda n: (self._rank(n), n), default=None)
        if name is None or (rank := self._rank(name)) == inf:
            return None
        room = (
            self._max_bytes
            - self._size((*self._files, *self._fetching))
            - self._repo.file(name).size
        )
        victims = []
        for other in sorted(self._files, key=self._rank, reverse=True):
            if room >= 0:
                break
            if self._rank(other) > rank and not self._held[other] and not self._wanted[other]:
                victims.append(other)
                room += self._repo.file(other).size
        if room < 0:
            return None
        for victim in victims:
            self._drop(victim)
        return name

    def _fetch(self, name: str) -> None:
        """Gets a shard, goes on with one that is there in part, verifies it, and gives it its name."""
        file, path = self._repo.file(name), self._path(name)
        partial = path.with_suffix(".partial")
        for _ in range(2):
            _log.info("fetching %s (%d bytes)", name, file.size)
            hasher = file.hasher()
            with OutputFile(partial, keep=True) as f:
                end = 0
                while chunk := f.read_at(4 << 20, end):
                    hasher.update(chunk)
                    end += len(chunk)
                    self._check_stop()
                if end < file.size:
                    for chunk in self._repo.chunks(name, end, file.size):
                        f.write_at(chunk, end)
                        hasher.update(chunk)
                        end += len(chunk)
                        self._check_stop()
                f.sync()
            if hasher.hexdigest() == file.etag:
                break
            remove(partial)
            _log.warning("%s: its hash is not the one that the Hub says; fetching it again", file)
        else:
            raise SourceError(
                f"{file}: was fetched twice, and its hash is not {file.etag}, as the Hub says",
                "the line or a proxy damages it, or the Hub is a faulty mirror: use another one (HF_ENDPOINT)",
            )
        rename(partial, path)
        with self._changed:
            self._files[name] = _open(path)
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
    """The size of a regular file; -1 of a link and anything else."""
    with translated(path, "read"):
        status = path.lstat()
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
