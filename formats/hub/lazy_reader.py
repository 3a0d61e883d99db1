"""Reader that fetches experts from the Hub on demand, and the others in the background."""

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
from formats.hub.lazy_folder import LazyFolder
from formats.hub.repo import HubRepo
from formats.progress import Progress, no_progress
from formats.reading.direct_reader import DirectReader
from formats.reading.reader import aligned_bytes

_log = logging.getLogger(__name__)

_CLOSE_WAIT_S = 5.0
"""Longest wait of `close` for the background thread."""

Key = tuple[int, int]
"""(layer, expert)"""


class HubReader(DirectReader):
    """Reads the experts in `folder`, and fetches missing ones into it.

    Fetched bytes are compared with the index's sha256 before use, and recorded once they are
    durable. An expert that was fetched in part is resumed. fill: a thread fetches missing experts
    while the engine reads nothing, those of the next layers first. progress is called with
    ("experts", bytes on disk, bytes of all experts).
    """

    def __init__(
        self,
        folder: LazyFolder,
        *,
        check: str = "fast",
        fill: bool = True,
        progress: Progress = no_progress,
    ) -> None:
        super().__init__(folder.artifact, check=check)
        self.fetched_bytes = 0
        """Bytes of experts fetched from the Hub by this reader."""
        self._folder = folder
        self._progress = progress
        self._entries = {
            (e.layer, e.expert): e for file in self.artifact.index.layers for e in file.experts
        }
        self._checked = {key for key in self._entries if folder.has(*key)}
        """Experts whose bytes are in the file and match the index."""
        self._written = {key: self._entries[key].length for key in self._checked}
        """Number of an expert's first bytes that are in the file, checked or not."""
        self._expert_locks: defaultdict[Key, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Condition()
        self._unrecorded: list[Key] = []
        self._reads = 0
        """Reads of the engine that are running."""
        self._last_layer = -1
        self._fills = fill
        self._filling: Key | None = None
        """The expert that the background thread fetches."""
        self._awaited = False
        """True if the engine waits for that expert."""
        self._stopped = False
        self._writers = [
            OutputFile(self.artifact.layer_path(n), keep=True) for n in range(len(self._files))
        ]
        self._thread: threading.Thread | None = threading.Thread(
            target=self._work, name="moe-fill", daemon=True
        )
        self._thread.start()

    def status(self) -> tuple[int, int]:
        """Return (bytes of the experts on disk, bytes of all experts)."""
        with self._lock:
            on_disk = sum(self._entries[key].length for key in self._checked)
        return on_disk, sum(entry.length for entry in self._entries.values())

    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        with self._engine_read((layer, expert)):
            self._read_or_fetch((layer, expert), place, begin, end)

    def check(self, layer: int, expert: int, stored: Tensor) -> None:
        key = (layer, expert)
        if key in self._checked:
            super().check(layer, expert, stored)
            return
        with self._expert_locks[key]:
            self._check_or_fetch_again(key, stored)
        with self._lock:
            if key not in self._checked:
                self._checked.add(key)
                self._unrecorded.append(key)
                self._lock.notify_all()
        self._progress("experts", *self.status())

    def start_anew(self) -> None:
        """Prepare for use in a forked child.

        The child fetches the experts that it needs into the same files. Only the parent continues
        in the background and records experts.
        """
        self._expert_locks.clear()
        self._lock = threading.Condition()
        self._reads = 0
        self._filling = None
        self._awaited = False
        self._fills = False
        self._thread = None
        self._folder.start_anew()

    def stop(self) -> None:
        # The files stay open until no read is running.
        self._folder.stop.set()

    def close(self) -> None:
        self.stop()
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        # The thread closes the files itself, even if a slow connection delays its end. `close` may
        # also be called in it, when it drops the last reference to the model.
        if self._thread is None:
            self._close_files()
        elif self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_WAIT_S)

    def _check_or_fetch_again(self, key: Key, stored: Tensor) -> None:
        """Compare an expert's bytes with the sha256; fetch them once more if they differ.

        Then the bytes in the file are right, too. Raises DamageError.
        """
        expected = self._entries[key].sha256
        sha256 = sha256_of(stored.numpy().data)
        if sha256 != expected:
            # A broken connection raises: the answer was damaged, or our file.
            self._written[key] = 0
            self._read_hub(key, stored, 0, len(stored), from_cache=False)
            sha256 = sha256_of(stored.numpy().data)
        if sha256 != expected:
            raise DamageError(
                f"{self.name(*key)}: the sha256 of the Hub's bytes is {sha256}, the index says"
                f" {expected}",
                "the repository is damaged: tell its owner, or give another --revision",
            )
        if self._written.get(key, 0) < len(stored):
            self._write(key, stored, 0)

    def _read_or_fetch(self, key: Key, place: Tensor, begin: int, end: int) -> None:
        """Read bytes [begin, end) of an expert from the file; fetch and write missing ones."""
        with self._expert_locks[key]:
            written = self._written.get(key, 0)
            if begin < written:
                super().fetch(*key, place, begin, min(written, end))
            if (begin := max(begin, written)) < end:
                self._read_hub(key, place, begin, end)
                if begin == written:
                    self._write(key, place[:end], begin)

    def _read_hub(
        self, key: Key, place: Tensor, begin: int, end: int, *, from_cache: bool = True
    ) -> None:
        """Read bytes [begin, end) of an expert from the user's cache or the Hub into `place`."""
        if (repo := self._folder.repo) is None:
            raise HubError(
                f"{self.name(*key)}: not fetched yet, and offline (HF_HUB_OFFLINE)", "go online"
            )
        file = self.artifact.index.layers[key[0]].file
        offset = self._entries[key].offset + begin
        view = place.numpy().data[begin:end]
        if from_cache and (cached := repo.cached(file)):
            with translated(cached, "read", HubError), open(cached, "rb") as f:
                f.seek(offset)
                if f.readinto(view) == end - begin:
                    return
        position = 0
        for chunk in repo.chunks(file, offset, offset + len(view)):
            if self._folder.stop.is_set():
                raise HubError(f"{self.name(*key)}: the model was closed during the download")
            view[position : position + len(chunk)] = chunk
            position += len(chunk)
        with self._lock:
            self.fetched_bytes += end - begin

    def _write(self, key: Key, place: Tensor, begin: int) -> None:
        """Write place[begin:] to the expert's place in its file, not yet durably."""
        self._writers[key[0]].write_at(
            place.numpy().data[begin:], self._entries[key].offset + begin
        )
        self._written[key] = len(place)

    @contextmanager
    def _engine_read(self, key: Key) -> Iterator[None]:
        """Hold off the background thread during the block, unless it fetches the same expert."""
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
        """Run the background thread: record checked experts, fetch missing ones, then close."""
        try:
            while True:
                with self._lock:
                    while not (
                        self._unrecorded or self._stopped or (self._fills and not self._reads)
                    ):
                        self._lock.wait()
                    unrecorded = self._unrecorded
                    self._unrecorded = []
                try:
                    if unrecorded:
                        self._make_durable(unrecorded)
                    elif self._stopped:
                        return
                    else:
                        self._fill()
                except Exception as e:
                    # Any exception ends only the filling: the engine goes on using the files,
                    # which this thread closes at its end.
                    self._fills = False
                    if not self._folder.stop.is_set():
                        _log.warning(
                            "the download in the background ended: %s",
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
        """Fetch the next missing expert in one request.

        The answer is not read while the engine reads, so that the engine has the full bandwidth.
        """
        key = self._next()
        repo = self._folder.repo
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
                self._filling = None
                self._awaited = False
        if not self._stopped:
            self.check(*key, place[: self._entries[key].length])

    def _stream(self, key: Key, repo: HubRepo, place: Tensor) -> None:
        """Bring an expert's bytes to `place` and to its file, as `_fill` describes."""
        entry = self._entries[key]
        file = self.artifact.index.layers[key[0]].file
        position = self._written.get(key, 0)
        super().fetch(*key, place, 0, position)
        if repo.cached(file):
            self._read_hub(key, place, position, entry.length)
            self._write(key, place[: entry.length], position)
            return
        for chunk in repo.chunks(file, entry.offset + position, entry.offset + entry.length):
            with self._lock:
                self.fetched_bytes += len(chunk)
                # Unread, the answer takes no bandwidth. Read on if the engine waits for it.
                while self._reads and not (self._awaited or self._stopped):
                    self._lock.wait()
                if self._stopped:
                    return
            end = position + len(chunk)
            place.numpy().data[position:end] = chunk
            self._write(key, place[:end], position)
            position = end

    def _next(self) -> Key | None:
        """Return the missing expert whose layer comes soonest after the last layer read."""
        with self._lock:
            missing = self._entries.keys() - self._checked
            first = self._last_layer + 1
        return min(
            missing, key=lambda key: ((key[0] - first) % len(self._writers), key[1]), default=None
        )
