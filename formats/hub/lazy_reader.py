"""Experts that come from the Hub when they are needed, and meanwhile one after the other; each byte
once.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from formats.checksums import sha256_of
from formats.errors import DamageError, HubError, MoeConvertError
from formats.files.io_errors import translated
from formats.files.output_file import OutputFile
from formats.hub.lazy_folder import LazyFolder, Progress
from formats.hub.repo import HubRepo
from formats.reading.direct_reader import DirectReader
from formats.reading.reader import aligned_bytes

_log = logging.getLogger(__name__)

_CLOSE_WAIT_S = 5.0

Key = tuple[int, int]
"""(layer, expert)"""


class HubReader(DirectReader):
    """Reads experts that are in `folder` from there, and fetches the others, which it writes there.

    Fetched bytes are compared with the index's sha256 before they are used, and recorded once they
    are durable; a guess that was given up goes on where it stopped. With `fill`, a thread fetches
    what is missing while no read of the engine is under way, the layers that come next first. Once
    all is there the folder is a converted one. progress gets ("experts", bytes there, bytes of
    all).
    """

    def __init__(
        self,
        folder: LazyFolder,
        *,
        check: str = "fast",
        fill: bool = True,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(folder.artifact, check=check)
        self.fetched_bytes = 0
        """From the Hub, of experts."""
        self._folder, self._progress = folder, progress
        self._entries = {
            (e.layer, e.expert): e for file in self.artifact.index.layers for e in file.experts
        }
        self._good = {key for key in self._entries if folder.has(*key)}
        self._have = {key: self._entries[key].length for key in self._good}
        """How many of an expert's bytes, from its first, are in the file; compared or not."""
        self._expert_locks: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Condition()
        self._unrecorded: list[Key] = []
        self._reads, self._last_layer = 0, -1
        self._filling: Key | None = None
        self._fills, self._awaited, self._stopped = fill, False, False
        self._writers = [
            OutputFile(self.artifact.layer_path(n), keep=True) for n in range(len(self._files))
        ]
        self._thread: threading.Thread | None = threading.Thread(
            target=self._work, name="moe-fill", daemon=True
        )
        self._thread.start()

    def status(self) -> tuple[int, int]:
        """(bytes of the experts that are there, bytes of all experts)."""
        with self._lock:
            there = sum(self._entries[key].length for key in self._good)
        return there, sum(entry.length for entry in self._entries.values())

    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        with self._engine_read((layer, expert)):
            self._bring((layer, expert), place, begin, end)

    def check(self, layer: int, expert: int, stored: Tensor) -> None:
        key, expected = (layer, expert), self._entries[layer, expert].sha256
        if key in self._good:
            super().check(layer, expert, stored)
            return
        with self._expert_locks[key]:
            found = sha256_of(stored.numpy().data)
            if found != expected:
                # Not by the line, whose breaks are seen: by a damaged answer, or a damaged file of
                # ours.
                self._have[key] = 0
                self._read_hub(key, stored, 0, len(stored), from_cache=False)
                found = sha256_of(stored.numpy().data)
            if found != expected:
                place = self.name(layer, expert)
                raise DamageError(
                    f"{place}: the sha256 of what the Hub gives is {found}, the index says {expected}",
                    "the repository is damaged: tell its owner, or give another --revision",
                )
            if self._have.get(key, 0) < len(stored):
                self._write(key, stored, 0)
        with self._lock:
            if key not in self._good:
                self._good.add(key)
                self._unrecorded.append(key)
                self._lock.notify_all()
        if self._progress:
            self._progress("experts", *self.status())

    def start_anew(self) -> None:
        """For a forked child: it fetches what it needs, into the same files; only the parent goes
        on with the others, and records what it fetched itself.
        """
        self._expert_locks.clear()
        self._lock = threading.Condition()
        self._reads, self._filling, self._awaited = 0, None, False
        self._fills, self._thread = False, None
        self._folder.start_anew()

    def stop(self) -> None:
        # Nothing else: the files stay open until no read is under way.
        self._folder.stop.set()

    def close(self) -> None:
        self.stop()
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        # It closes the files itself, also where a line keeps it from ending soon; and the last
        # reference to the model may have been dropped in it.
        if self._thread is None:
            self._close_files()
        elif self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_WAIT_S)

    def _bring(self, key: Key, place: Tensor, begin: int, end: int) -> None:
        """Bytes [begin, end) of an expert, from the file as far as they are there; the others get
        there.
        """
        with self._expert_locks[key]:
            have = self._have.get(key, 0)
            if begin < have:
                super().fetch(*key, place, begin, min(have, end))
            if (begin := max(begin, have)) < end:
                self._read_hub(key, place, begin, end)
                if begin == have:
                    self._write(key, place[:end], begin)

    def _read_hub(
        self, key: Key, place: Tensor, begin: int, end: int, *, from_cache: bool = True
    ) -> None:
        if (repo := self._folder.repo) is None:
            raise HubError(
                f"{self.name(*key)}: not fetched yet, and offline (HF_HUB_OFFLINE)", "go online"
            )
        file, offset = self.artifact.index.layers[key[0]].file, self._entries[key].offset + begin
        view = place.numpy().data[begin:end]
        if from_cache and (cached := repo.cached(file)):
            with translated(cached, "read", HubError), open(cached, "rb") as f:
                f.seek(offset)
                if f.readinto(view) == end - begin:
                    return
        position = 0
        for chunk in repo.chunks(file, offset, offset + len(view)):
            if self._folder.stop.is_set():
                raise HubError(f"{self.name(*key)}: the model was closed while it was fetched")
            view[position : position + len(chunk)] = chunk
            position += len(chunk)
        with self._lock:
            self.fetched_bytes += end - begin

    def _write(self, key: Key, place: Tensor, begin: int) -> None:
        """Writes place[begin:] where it belongs, not durably yet."""
        self._writers[key[0]].write_at(
            place.numpy().data[begin:], self._entries[key].offset + begin
        )
        self._have[key] = len(place)

    @contextmanager
    def _engine_read(self, key: Key) -> Iterator[None]:
        with self._lock:
            self._reads += 1
            self._last_layer = key[0]
            if key == self._filling:
                self._awaited = True
                self._lock.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._reads -= 1
                self._lock.notify_all()

    def _work(self) -> None:
        """The thread: records what was compared, fetches what is missing, and closes the files at
        the end.
        """
        try:
            while True:
                with self._lock:
                    while not (
                        self._unrecorded or self._stopped or (self._fills and not self._reads)
                    ):
                        self._lock.wait()
                    unrecorded, self._unrecorded = self._unrecorded, []
                try:
                    if unrecorded:
                        self._make_durable(unrecorded)
                    elif self._stopped:
                        return
                    else:
                        self._fill()
                except Exception as e:
                    # Whatever it is: the engine goes on with the files, which close where this
                    # thread ends.
                    self._fills = False
                    if not self._folder.stop.is_set():
                        _log.warning(
                            "fetching ahead ended: %s",
                            e if isinstance(e, MoeConvertError) else repr(e),
                        )
        finally:
            self._close_files()

    def _close_files(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()
        self._folder.close()
        super().close()

    def _make_durable(self, keys: list[Key]) -> None:
        for layer in {layer for layer, _ in keys}:
            self._writers[layer].sync()
        self._folder.record(keys)

    def _fill(self) -> None:
        """Fetches one expert in one answer, which is not read on while the engine reads: the line
        is the engine's.
        """
        key, repo = self._next(), self._folder.repo
        if key is None or repo is None:
            self._fills = False
            return
        place = aligned_bytes(self._entries[key].length)
        with self._lock:
            self._filling = key
        try:
            with self._expert_locks[key]:
                self._stream(key, repo, place)
        finally:
            with self._lock:
                self._filling, self._awaited = None, False
        if not self._stopped:
            self.check(*key, place[: self._entries[key].length])

    def _stream(self, key: Key, repo: HubRepo, place: Tensor) -> None:
        entry, file = self._entries[key], self.artifact.index.layers[key[0]].file
        have = self._have.get(key, 0)
        super().fetch(*key, place, 0, have)
        if repo.cached(file):
            self._read_hub(key, place, have, entry.length)
            self._write(key, place[: entry.length], have)
            return
        for chunk in repo.chunks(file, entry.offset + have, entry.offset + entry.length):
            with self._lock:
                self.fetched_bytes += len(chunk)
                # Not read on, the answer takes nothing of the line; unless it is what the engine
                # waits for.
                while self._reads and not (self._awaited or self._stopped):
                    self._lock.wait()
                if self._stopped:
                    return
            end = have + len(chunk)
            place.numpy().data[have:end] = chunk
            self._write(key, place[:end], have)
            have = end

    def _next(self) -> Key | None:
        """The missing expert whose layer is used soonest after the one of the latest read."""
        with self._lock:
            missing, first = self._entries.keys() - self._good, self._last_layer + 1
        return min(
            missing, key=lambda key: ((key[0] - first) % len(self._writers), key[1]), default=None
        )
