"""Shards of a Hub repository on disk while they are needed, within a limit; fetched ahead, verified, deleted."""

import contextlib
import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from math import inf
from pathlib import Path

from converter.shards import Stopped
from formats.errors import DoesNotFitError, MoeConvertError, OutputError, SourceError
from formats.hub import HubRepo

_CONNECTIONS = 2
_LOOK_EVERY_S = 0.2

_log = logging.getLogger(__name__)


class FetchedShards:
    """Keeps at most `max_bytes` of shards in `folder`, which it owns; threads fetch what is needed next.

    Each shard is compared with the Hub's hash before it gets its name, which is that hash; so what an earlier run
    fetched is used, and what it fetched in part is completed. A shard goes when no expected work needs it any more. One
    that is needed sooner takes the place of one that is needed later; so the earliest work always gets on, if the
    limit has room for what one piece of work needs.
    """

    def __init__(self, repo: HubRepo, folder: Path, max_bytes: int, stop: threading.Event) -> None:
        self._repo, self._folder, self._max_bytes, self._stop = repo, folder, max_bytes, stop
        self._needs: list[tuple[object, frozenset[str]]] = []
        self._left: dict[str, set[int]] = {}
        self._positions: dict[object, int] = {}
        self._files: dict[str, int] = {}
        self._fetching: set[str] = set()
        self._wanted: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def expect(self, needs: Iterable[tuple[object, frozenset[str]]]) -> None:
        """Begins to fetch what the work needs, in its order, instead of what was expected before. DoesNotFitError if
        the limit is less than one piece's."""
        with self._changed:
            self._plan(list(needs))
            for name in list(self._files):
                self._drop_if_idle(name)
            self._changed.notify_all()
        if self._threads:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._take_over()
        for _ in range(_CONNECTIONS):
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _plan(self, needs: list[tuple[object, frozenset[str]]]) -> None:
        self._needs = needs
        self._positions.clear()
        self._left.clear()
        for position, (key, names) in enumerate(self._needs):
            self._positions[key] = position
            for name in names:
                self._left.setdefault(name, set()).add(position)
            if (size := self._size(names)) > self._max_bytes:
                raise DoesNotFitError(
                    f"--max-disk {self._max_bytes}: {len(names)} shards are needed at once, {size} bytes",
                    f"allow {size}, or add --no-keep to read without keeping anything",
                )

    def done(self, key: object) -> None:
        """The work is done; shards that were needed for it alone are deleted."""
        with self._changed:
            position = self._positions.get(key)
            if position is None:
                return
            for name in self._needs[position][1]:
                self._left[name].discard(position)
                self._drop_if_idle(name)
            self._changed.notify_all()

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[int]:
        """The open shard, which stays on disk meanwhile. Waits for it; raises what fetching raised, or Stopped."""
        with self._changed:
            self._wanted[name] += 1
            self._changed.notify_all()
            try:
                while name not in self._files:
                    if self._error:
                        raise self._error
                    if self._stop.is_set() or not self._threads:
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
        """The first work that needs it; -1 if it is read beyond what was expected (a resumed calibration does)."""
        beyond = -1 if self._wanted[name] or self._held[name] else inf
        return min(self._left.get(name, ()), default=beyond)

    def _drop_if_idle(self, name: str) -> None:
        if name in self._files and self._rank(name) == inf:
            self._drop(name)

    def _drop(self, name: str) -> None:
        os.close(self._files.pop(name))
        self._path(name).unlink(missing_ok=True)
        _log.info("deleted %s", name)

    def _path(self, name: str) -> Path:
        return self._folder / self._repo.file(name).etag

    def _take_over(self) -> None:
        """Opens what an earlier run left and this one will need first; the rest of the folder is deleted."""
        kept, room = set(), self._max_bytes
        for name in sorted(self._left, key=self._rank):
            if (room := room - self._repo.file(name).size) < 0:
                break
            kept.add(name)
        paths = {self._path(name): name for name in kept}
        for path in sorted(self._folder.iterdir()):
            kept_name = paths.get(path.with_suffix(""))
            if kept_name is None:
                path.unlink()
            elif path.suffix == "" and path.stat().st_size == self._repo.file(kept_name).size:
                self._files[kept_name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

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
        except OSError as e:
            self._fail(_disk_error(e, self._folder))
        except Exception as e:
            self._fail(e)

    def _choose(self) -> str | None:
        """The shard to fetch next, with room made for it; None if there is none or no room that may be made."""
        absent = [n for n in {*self._left, *self._wanted} if n not in self._files and n not in self._fetching]
        name = min(absent, key=lambda n: (self._rank(n), n), default=None)
        if name is None or (rank := self._rank(name)) == inf:
            return None
        room = self._max_bytes - self._size((*self._files, *self._fetching)) - self._repo.file(name).size
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
            with open(partial, "ab+") as f:
                f.seek(0)
                while chunk := f.read(4 << 20):
                    hasher.update(chunk)
                    self._check_stop()
                if f.tell() <= file.size:
                    for chunk in self._repo.chunks(name, f.tell(), file.size):
                        f.write(chunk)
                        hasher.update(chunk)
                        self._check_stop()
                    f.flush()
                    os.fsync(f.fileno())
            if hasher.hexdigest() == file.etag:
                break
            partial.unlink()
            _log.warning("%s: its hash is not the one that the Hub says; fetching it again", file)
        else:
            raise SourceError(
                f"{file}: was fetched twice, and its hash is not {file.etag}, as the Hub says",
                "the line or a proxy damages it, or the Hub is a faulty mirror: use another one (HF_ENDPOINT)",
            )
        partial.rename(path)
        with self._changed:
            self._files[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._drop_if_idle(name)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _disk_error(error: OSError, folder: Path) -> MoeConvertError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space or lower --max-disk, and run the same command again: it goes on where it stopped"
        return DoesNotFitError(f"{folder}: the disk is full", hint)
    return OutputError(f"{folder}: {error.strerror}", "look at the disk, and run the same command again")
