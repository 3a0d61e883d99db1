"""What the cache asks of a reader: `formats.reading.reader.ExpertReader` for RAM,
loader/cuda/experts/gpu_reader.py for GPUs.
"""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from formats.artifact import Artifact


class Load(Protocol):
    """One expert on its way, as `formats.reading.reader.Load`; for one thread at a time."""

    @property
    def done(self) -> int:
        """Bytes that it has brought on."""

    @property
    def remaining(self) -> int:
        """0 when `result` may be called."""

    @property
    def at_once(self) -> bool:
        """Whether a whole step takes no time, because it only queues a copy."""

    @property
    def queued(self) -> bool:
        """Whether a copy that gives `result` its bytes may not be over; uses of it are ordered
        after (`before_use`).
        """

    def step(self, at_most: int | None = None) -> int:
        """Brings on at most so many bytes, by default all; how many. Errors as
        `formats.reading.reader.Load`.
        """

    def result(self) -> Tensor:
        """uint8 [n_bytes]."""

    def close(self) -> None:
        """It is no longer needed, whatever came of it; the result stays."""


class Reader(Protocol):
    """Brings experts to the cache's buffers."""

    artifact: Artifact

    def in_place(self, layer: int, expert: int) -> bool:
        """Whether the expert needs no buffer."""

    def load(self, layer: int, expert: int, buffer: Tensor | None) -> Load:
        """Begins to bring an expert; waits for nothing."""

    def moved_bytes(self, layer: int, expert: int) -> int:
        """What bringing an expert moves, for the counters."""

    def forget(self, layer: int, expert: int) -> None:
        """An expert that had no buffer is not used any more."""

    def before_use(self, blobs: Iterable[Tensor]) -> None:
        """What the caller's stream is given from now on may use `blobs`."""

    def after_use(self, blobs: Iterable[Tensor]) -> None:
        """The caller's stream has been given all that uses `blobs`."""

    def before_free(self, memory: Tensor) -> None:
        """No buffer in `memory` is used any more; it will be freed."""

    def start_anew(self) -> None:
        """Called in a forked child, which has none of the threads that were reading."""

    def stop(self) -> None:
        """Nobody needs what is being read: reads end soon, at best with an error."""

    def close(self) -> None:
        """Ends reading, after the last read."""
