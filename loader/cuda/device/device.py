"""The protocol of a GPU: memory, streams, events, copies and launches."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Value = Any
"""An argument of a kernel.

A tensor is passed as its address, an int as int64_t, a float as float. ctypes values are passed as
they are; structures are passed by value.
"""


class Event(Protocol):
    """A point in a stream's work."""

    def record(self, stream: Any) -> None:
        """Set the point after all work that `stream` has now."""

    def query(self) -> bool:
        """True if the work before the point is done."""

    def synchronize(self) -> None:
        """Make the host wait until the work before the point is done."""


class Stream(Protocol):
    """Work that runs in order; work of other streams may overlap with it."""

    def wait_event(self, event: Any) -> None:
        """Make all later work of this stream wait for the event."""

    def synchronize(self) -> None:
        """Make the host wait for all work of this stream."""


class Device(Protocol):
    """One GPU. Methods may be called from several threads, but launches from one at a time."""

    name: str
    """Name as in "cuda:0"."""
    torch_device: torch.device
    """The device of its tensors."""
    capability: tuple[int, int]
    """Compute capability as in (7, 5)."""

    def empty(self, n_bytes: int) -> Tensor:
        """Return uint8 [n_bytes] of its memory, aligned to 256 bytes.

        Raises torch.OutOfMemoryError if the memory does not suffice.
        """

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes; blocks that torch's allocator caches count as free."""

    def release(self) -> None:
        """Return the blocks that torch's allocator caches to the system."""

    def new_stream(self) -> Any:
        """Return a new stream for copies."""

    def compute_stream(self) -> Any:
        """Return the stream of this thread's torch operations and launches."""

    def new_event(self) -> Any:
        """Return a new event, not yet recorded."""

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Queue a copy between host and GPU on `stream`. Both are uint8 of one size.

        If the host's side is not page-locked, the call takes as long as the copy.
        """

    def pin(self, memory: Tensor) -> bool:
        """Page-lock host memory until `unpin`, or for the life of the process.

        memory: whole pages, not locked yet. Returns False if the system refuses.
        """

    def unpin(self, memory: Tensor) -> None:
        """Unlock memory that `pin` locked."""

    def prepare(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        args: Sequence[Value],
        *,
        shared_bytes: int = 0,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
    ) -> Callable[[], None]:
        """Return a function that launches `kernel` on the compute stream.

        Between calls the caller may change ctypes values among `args`, and a list given as `reads`.
        reads, writes: memory that other streams write or read; only recorders of tests use them.
        """

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        args: Sequence[Value],
        *,
        shared_bytes: int = 0,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
    ) -> None:
        """Launch `kernel` once; arguments as in `prepare`."""


def kernel_argument(value: Value) -> Any:
    """Return the ctypes value that a launch passes for `value`."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value
