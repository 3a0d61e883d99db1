"""Experts' packed bytes from a converted folder, step by step, over maps or by direct reads."""

import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType

import torch
import zstandard
from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.artifact import Artifact
from formats.checksums import sha256_of, xxh3_of
from formats.errors import DamageError
from formats.files.io_errors import io_error
from formats.repair.repair_hints import repair_command

PIECE_BYTES = 4 << 20
"""What is read between two looks at whether something else has become more urgent."""

_PAUSES_S = (0.0, 0.1)
"""Before each repetition of a read that the system refused."""


def aligned_bytes(n_bytes: int) -> Tensor:
    """Fresh zeros on a page boundary, as direct reads need them: uint8 [n_bytes rounded up to
    ALIGNMENT_BYTES].
    """
    size = max(1, -(-n_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
    # Private: shared memory gets no huge pages, and a forked child would write into it.
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Load:
    """One expert on its way into memory. Call `step` until `remaining` is 0, then `result`. For one
    thread at a time.

    `place` is where its stored bytes come to lie: uint8, at least [length].
    """

    def __init__(
        self, reader: "ExpertReader", layer: int, expert: int, place: Tensor, buffer: Tensor | None
    ) -> None:
        self._reader = reader
        self._layer, self._expert = layer, expert
        self._place, self._buffer = place, buffer
        self._length = reader.artifact.entry(layer, expert).length
        self.done = 0

    at_once = queued = False
    """Other loads than these (loader/experts/reader_protocol.py) only queue a copy, and give bytes
    that are still on their way.
    """

    @property
    def remaining(self) -> int:
        """Stored bytes that have not been read."""
        return self._length - self.done

    def step(self, at_most: int | None = None) -> int:
        """Reads on, at most so many bytes (rounded up to ALIGNMENT_BYTES), by default all. Gives
        how many were read.

        A refused read is tried again; then, and where the file has become shorter, DamageError
        names file, layer, expert and offset.
        """
        begin, end = self.done, self._length
        if at_most is not None:
            end = min(end, begin + -(-at_most // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        for pause_s in (*_PAUSES_S, None):
            try:
                self._reader.fetch(self._layer, self._expert, self._place, begin, end)
                break
            except OSError as e:
                if pause_s is None:
                    raise io_error(
                        e, self._reader.name(self._layer, self._expert), "read", DamageError
                    ) from e
                time.sleep(pause_s)
        self.done = end
        return end - begin

    def result(self) -> Tensor:
        """The expert's bytes as its packings lay them out: uint8 [n_bytes], read-only by agreement.

        Raises DamageError if a frame is broken, or if the checksum that the reader compares is not
        the index's.
        """
        stored = self._place[: self._length]
        self._reader.check(self._layer, self._expert, stored)
        if self._buffer is None:
            return stored
        return self._reader.decode(self._layer, self._expert, stored, self._buffer)

    def close(self) -> None:
        """Nothing: it holds no more than its memory."""


class ExpertReader(ABC):
    """Gives experts' packed bytes; several threads may read at once. Close it, or use it as a
    context.

    check: one of `formats.checksums.CHECKS`: which checksum of an expert is compared with the
    index's whenever its bytes were read.
    """

    def __init__(self, artifact: Artifact, *, check: str = "fast") -> None:
        self.artifact = artifact
        self._check = check

    @abstractmethod
    def in_place(self, layer: int, expert: int) -> bool:
        """Whether the expert needs no buffer: its bytes are used where they lie."""

    @abstractmethod
    def load(self, layer: int, expert: int, buffer: Tensor | None) -> Load:
        """Begins to read an expert; nothing is read before the first step. `buffer`, uint8 from
        `aligned_bytes` of at least the expert's n_bytes, receives it; None where the expert is
        `in_place`.
        """

    def read(self, layer: int, expert: int) -> Tensor:
        """The whole expert at once, uint8 [n_bytes], where it lies or in memory of its own. Errors
        as `Load`.
        """
        fits = (
            None
            if self.in_place(layer, expert)
            else aligned_bytes(self.artifact.layout(layer, expert).n_bytes)
        )
        load = self.load(layer, expert, fits)
        load.step()
        return load.result()

    @abstractmethod
    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        """Brings the stored bytes [begin, end) of an expert to `place`; OSError or DamageError. For
        `Load`.
        """

    def moved_bytes(self, layer: int, expert: int) -> int:
        """What bringing an expert moves: its stored bytes."""
        return self.artifact.entry(layer, expert).length

    def forget(self, layer: int, expert: int) -> None:  # noqa: B027
        """Gives back the memory of an expert that was used where it lies; nothing to do for one in
        a buffer.
        """

    def before_use(self, blobs: Iterable[Tensor]) -> None:  # noqa: B027
        """Nothing: bytes in RAM are there when they are given (loader/experts/reader_protocol.py)."""

    def after_use(self, blobs: Iterable[Tensor]) -> None:  # noqa: B027
        """Nothing: what used them is over."""

    def before_free(self, memory: Tensor) -> None:  # noqa: B027
        """Nothing: no copy is under way."""

    def check(self, layer: int, expert: int, stored: Tensor) -> None:
        """DamageError if `stored`, an expert's bytes as they were read, have another checksum than
        the index says.
        """
        if self._check == "none":
            return
        entry, fast = self.artifact.entry(layer, expert), self._check == "fast"
        expected = entry.xxh3 if fast else entry.sha256
        found = (xxh3_of if fast else sha256_of)(stored.numpy().data)
        if found != expected:
            kind = "xxh3" if fast else "sha256"
            raise DamageError(
                f"{self.name(layer, expert)}: the {kind} of its bytes is {found}, the index says {expected}",
                repair_command(self.artifact.folder, self.artifact.index),
            )

    def decode(self, layer: int, expert: int, stored: Tensor, buffer: Tensor) -> Tensor:
        """The expert's bytes of what is stored, in `buffer`."""
        n_bytes = self.artifact.layout(layer, expert).n_bytes
        frame, room = stored.numpy().data, buffer[:n_bytes]
        try:
            # The frame's own word first: a decompressor takes whatever memory it asks for.
            declared = zstandard.get_frame_parameters(frame).content_size
            if declared != n_bytes:
                place = self.name(layer, expert)
                raise DamageError(
                    f"{place}: zstd frame of {declared} bytes, the expert takes {n_bytes}"
                )
            decoded = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as e:
            raise DamageError(f"{self.name(layer, expert)}: broken zstd frame: {e}") from None
        room.numpy().data[:] = decoded
        return room

    def name(self, layer: int, expert: int) -> str:
        """File, layer, expert and offset, for messages."""
        entry = self.artifact.entry(layer, expert)
        file = self.artifact.folder / self.artifact.index.layers[layer].file
        return f"{file}: layer {layer} expert {expert} at offset {entry.offset}"

    def start_anew(self) -> None:  # noqa: B027
        """Called in a forked child, which has none of the threads that were reading."""

    def stop(self) -> None:  # noqa: B027
        """Nobody needs what is being read: reads that wait for others end soon."""

    @abstractmethod
    def close(self) -> None:
        """Gives up files and maps; tensors over a map keep it alive."""

    def __enter__(self) -> "ExpertReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
