"""Loads of experts' packed bytes, step by step, and the readers that begin them."""

import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Self

import torch
import zstandard
from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.artifact import Artifact
from formats.checksums import sha256_of, xxh3_of
from formats.errors import DamageError
from formats.files.io_errors import io_error
from formats.repair_hints import repair_command

STEP_BYTES = 4 << 20
"""Size of one step of a prefetch. After each step a more urgent read may go first."""

_PAUSES_S = (0.0, 0.1)
"""Pauses before a failed read is tried again."""


def aligned_bytes(n_bytes: int) -> Tensor:
    """Return zeroed memory on a page boundary, as O_DIRECT needs it.

    uint8, `n_bytes` rounded up to ALIGNMENT_BYTES.
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
    """The read of one expert, in steps: call `step` until `remaining` is 0, then `result`.

    Only one thread at a time may use it. A load knows no reader: it calls two functions.

    fetch: reads the stored bytes [begin, end). finish: checks and decodes them, and returns the
    expert. length: number of stored bytes.
    """

    at_once = False
    """A step takes as long as its read; other loads only queue a copy
    (loader/experts/reader_protocol.py).
    """
    queued = False
    """The result is complete; other loads return bytes whose copy still runs."""

    def __init__(
        self, length: int, fetch: Callable[[int, int], None], finish: Callable[[], Tensor]
    ) -> None:
        self._length = length
        self._fetch = fetch
        self._finish = finish
        self.done = 0

    @property
    def remaining(self) -> int:
        """Number of stored bytes that are not yet read."""
        return self._length - self.done

    def step(self, at_most: int | None = None) -> int:
        """Read at most `at_most` bytes, rounded up to ALIGNMENT_BYTES (None: all); return how many.

        Raises DamageError with file, layer, expert and offset if reading fails repeatedly, or the
        file is shorter than its index says.
        """
        begin = self.done
        end = self._length
        if at_most is not None:
            end = min(end, begin + -(-at_most // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        self._fetch(begin, end)
        self.done = end
        return end - begin

    def result(self) -> Tensor:
        """Return the expert's packed bytes: uint8 [n_bytes], which the caller must not change.

        Raises DamageError for a wrong checksum or a broken zstd frame.
        """
        return self._finish()

    def close(self) -> None:
        """Do nothing: the load holds only its memory."""


class ExpertReader(ABC):
    """Gives experts' packed bytes. Several threads may read at once. Close it after use.

    check: the checksum of an expert that is compared with the index after each read, one of
    `formats.checksums.CHECKS`.
    """

    def __init__(self, artifact: Artifact, *, check: str = "fast") -> None:
        self.artifact = artifact
        self._check = check

    @abstractmethod
    def in_place(self, layer: int, expert: int) -> bool:
        """True if the expert needs no buffer, because it is used where its file is mapped."""

    @abstractmethod
    def place(self, layer: int, expert: int, buffer: Tensor | None) -> Tensor:
        """Return the memory to which `fetch` brings the stored bytes: uint8, at least [length].

        buffer: as in `load`.
        """

    @abstractmethod
    def fetch(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        """Read the stored bytes [begin, end) of an expert into `place`.

        Raises OSError, after which the read is tried again, or DamageError.
        """

    def load(self, layer: int, expert: int, buffer: Tensor | None) -> Load:
        """Begin to load an expert; the first step reads the first byte.

        buffer: receives the expert: uint8 from `aligned_bytes`, at least [n_bytes]; None if the
        expert is `in_place`.
        """
        entry = self.artifact.entry(layer, expert)
        place = self.place(layer, expert, buffer)
        return Load(
            entry.length,
            partial(self._fetch_or_retry, layer, expert, place),
            partial(
                self._finish,
                layer,
                expert,
                place[: entry.length],
                None if entry.codec == "none" else buffer,
            ),
        )

    def read(self, layer: int, expert: int) -> Tensor:
        """Read a whole expert: uint8 [n_bytes], in new memory unless it is `in_place`.

        Raises the errors of `Load`.
        """
        buffer = None
        if not self.in_place(layer, expert):
            buffer = aligned_bytes(self.artifact.layout(layer, expert).n_bytes)
        load = self.load(layer, expert, buffer)
        load.step()
        return load.result()

    def moved_bytes(self, layer: int, expert: int) -> int:
        """Return how many bytes a load of the expert moves: its stored bytes."""
        return self.artifact.entry(layer, expert).length

    def forget(self, layer: int, expert: int) -> None:  # noqa: B027
        """Release the memory of an expert that was used in place; do nothing for others."""

    def before_use(self, blobs: Iterable[Tensor]) -> None:  # noqa: B027
        """Do nothing: a result in RAM is complete (loader/experts/reader_protocol.py)."""

    def after_use(self, blobs: Iterable[Tensor]) -> None:  # noqa: B027
        """Do nothing: the use of the bytes has ended."""

    def before_free(self, memory: Tensor) -> None:  # noqa: B027
        """Do nothing: no copy is running."""

    def check(self, layer: int, expert: int, stored: Tensor) -> None:
        """Raise DamageError if the checksum of the stored bytes differs from the index.

        stored: all stored bytes of the expert, uint8 [length].
        """
        if self._check == "none":
            return
        entry = self.artifact.entry(layer, expert)
        fast = self._check == "fast"
        expected = entry.xxh3 if fast else entry.sha256
        checksum = (xxh3_of if fast else sha256_of)(stored.numpy().data)
        if checksum != expected:
            kind = "xxh3" if fast else "sha256"
            raise DamageError(
                f"{self.name(layer, expert)}: the {kind} of its bytes is {checksum},"
                f" the index says {expected}",
                repair_command(self.artifact.folder, self.artifact.index),
            )

    def decode(self, layer: int, expert: int, stored: Tensor, buffer: Tensor) -> Tensor:
        """Decompress a zstd frame into `buffer`; return the expert, uint8 [n_bytes].

        Raises DamageError for a broken frame or another size than the expert's.
        """
        n_bytes = self.artifact.layout(layer, expert).n_bytes
        frame = stored.numpy().data
        decoded = buffer[:n_bytes]
        try:
            # Before decompression, which allocates whatever size the frame declares.
            declared = zstandard.get_frame_parameters(frame).content_size
            if declared != n_bytes:
                raise DamageError(
                    f"{self.name(layer, expert)}: zstd frame of {declared} bytes,"
                    f" the expert takes {n_bytes}"
                )
            decoded.numpy().data[:] = zstandard.ZstdDecompressor().decompress(
                frame, allow_extra_data=False
            )
        except zstandard.ZstdError as e:
            raise DamageError(f"{self.name(layer, expert)}: broken zstd frame: {e}") from None
        return decoded

    def name(self, layer: int, expert: int) -> str:
        """Return file, layer, expert and offset, for messages."""
        entry = self.artifact.entry(layer, expert)
        file = self.artifact.folder / self.artifact.index.layers[layer].file
        return f"{file}: layer {layer} expert {expert} at offset {entry.offset}"

    def start_anew(self) -> None:  # noqa: B027
        """Prepare for use in a forked child, which has none of the reading threads."""

    def stop(self) -> None:  # noqa: B027
        """Make reads that wait for other machines end soon, with an error."""

    @abstractmethod
    def close(self) -> None:
        """Close files and maps. Tensors over a map keep it alive."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _fetch_or_retry(self, layer: int, expert: int, place: Tensor, begin: int, end: int) -> None:
        for pause_s in _PAUSES_S:
            try:
                self.fetch(layer, expert, place, begin, end)
                return
            except OSError:
                time.sleep(pause_s)
        try:
            self.fetch(layer, expert, place, begin, end)
        except OSError as e:
            raise io_error(e, self.name(layer, expert), "read", DamageError) from e

    def _finish(self, layer: int, expert: int, stored: Tensor, buffer: Tensor | None) -> Tensor:
        """Check the stored bytes; return the expert, decompressed into `buffer` if there is one."""
        self.check(layer, expert, stored)
        return stored if buffer is None else self.decode(layer, expert, stored, buffer)
