"""What the engine asks of a GPU: memory, streams, events, copies, launches.
loader/cuda/device/torch_device.py has torch's.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Value = Any
"""A kernel's argument: a tensor is its address, an int an int64_t, a float a float; ctypes values
are taken as they are, arrays as structures of so many pointers or numbers, by value.
"""


class Event(Protocol):
    """A point in a stream's work."""

    def record(self, stream: Any) -> None:
        """The point is after all that `stream` has been given until now."""

    def query(self) -> bool:
        """Whether the work before the point is done."""

    def synchronize(self) -> None:
        """The host waits until it is."""


class Stream(Protocol):
    """Work in order; work of other streams may overlap with it."""

    def wait_event(self, event: Any) -> None:
        """What is given from now on begins after the event's point."""

    def synchronize(self) -> None:
        """The host waits for all that was given."""


class Device(Protocol):
    """One GPU. Methods may be called from several threads; launches from one at a time.

    name: as in "cuda:0". torch_device: of its tensors. capability: as in (7, 5).
    """

    name: str
    torch_device: torch.device
    capability: tuple[int, int]

    def empty(self, n_bytes: int) -> Tensor:
        """uint8 [n_bytes] of its memory, at a multiple of 256; torch.OutOfMemoryError if there is
        too little.
        """

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what torch's allocator holds without using it is free."""

    def release(self) -> None:
        """Gives back to the system what torch's allocator holds without using it."""

    def new_stream(self) -> Any:
        """A stream of its own, for copies."""

    def compute_stream(self) -> Any:
        """The stream of this thread's torch operations and launches."""

    def new_event(self) -> Any:
        """An event that was not recorded yet."""

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:
        """Queues a copy between host and device on `stream`. Both uint8, of one size; the host's
        side pinned, or else the call takes as long as the copy.
        """

    def pin(self, memory: Tensor) -> bool:
        """Page-locks host memory (a whole number of pages, not pinned yet) for the process's life
        or until `unpin`; False where the system refuses.
        """

    def unpin(self, memory: Tensor) -> None:
        """Undoes `pin`."""

    def prepare(
        self, kernel: str, grid: tuple[int, int, int], threads: int, args: Sequence[Value], *, shared_bytes: int = 0,
        reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = (),
    ) -> Callable[[], None]:  # fmt: skip
        """What launches `kernel` on the compute stream each time it is called. ctypes values among
        `args`, and a list of reads, may be changed between calls. reads, writes: memory that other
        streams write or read, for stand-ins that check.
        """

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, args: Sequence[Value], *, shared_bytes: int = 0,
        reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        """`prepare`, once called."""


def kernel_argument(value: Value) -> Any:
    """The ctypes value that a launch passes for `value`."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value
