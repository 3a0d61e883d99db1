"""The reader protocol: what brings experts into the cache's buffers.

`formats.reading.reader.ExpertReader` implements it for RAM, loader/cuda/experts/gpu_reader.py for
GPUs.
"""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from formats.artifact import Artifact


class Load(Protocol):
    """One expert on its way to a buffer. For one thread at a time."""

    @property
    def done(self) -> int:
        """Bytes moved so far."""

    @property
    def remaining(self) -> int:
        """Bytes left; `result` may be called at 0."""

    @property
    def at_once(self) -> bool:
        """True if a step takes no time, because it only queues a copy."""

    @property
    def queued(self) -> bool:
        """True if the copy that fills `result` may still run; `Reader.before_use` orders uses."""

    def step(self, at_most: int | None = None) -> int:
        """Move at most `at_most` bytes (None: all), and return how many were moved.

        Raises the errors of `formats.reading.reader.Load`.
        """

    def result(self) -> Tensor:
        """Return the expert, uint8 [n_bytes]."""

    def close(self) -> None:
        """End the load, finished or not; the result stays valid."""


class Reader(Protocol):
    """Brings experts to the cache's buffers."""

    artifact: Artifact

    def in_place(self, layer: int, expert: int) -> bool:
        """True if the expert is used where its file is mapped, without a buffer."""

    def load(self, layer: int, expert: int, buffer: Tensor | None) -> Load:
        """Begin to load an expert, without waiting. buffer: uint8; None for `in_place`."""

    def moved_bytes(self, layer: int, expert: int) -> int:
        """Return how many bytes a load of the expert moves, for the counters."""

    def forget(self, layer: int, expert: int) -> None:
        """Release an expert that was used in place."""

    def before_use(self, blobs: Iterable[Tensor]) -> None:
        """Order all later work of the caller's stream after the copies that fill `blobs`."""

    def after_use(self, blobs: Iterable[Tensor]) -> None:
        """Order later copies into `blobs` after the work that the caller's stream has now."""

    def before_free(self, memory: Tensor) -> None:
        """Forget the buffers in `memory`, which are no longer used and will be freed."""

    def start_anew(self) -> None:
        """Prepare for use in a forked child, which has none of the reading threads."""

    def stop(self) -> None:
        """Make the reads under way end soon, with an error if need be."""

    def close(self) -> None:
        """Close the files. Called after the last read."""
