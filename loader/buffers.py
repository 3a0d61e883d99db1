"""Memory for packed experts: a fixed number of equal buffers, taken and given back."""

from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.reader import aligned_bytes


def buffer_bytes(n_bytes: int) -> int:
    """What an expert of `n_bytes` takes in a buffer: whole pages."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class BufferPool:
    """`count` page-aligned buffers for experts of up to `n_bytes`; the system backs them when they are first written.

    Not thread safe: its owner has a lock.
    """

    def __init__(self, n_bytes: int, count: int) -> None:
        size = buffer_bytes(n_bytes)
        memory = aligned_bytes(size * count)
        self._free = [memory[begin : begin + size] for begin in range(0, size * count, size)]

    def take(self) -> Tensor:
        """A buffer, uint8; IndexError if none is left, which its owner's counting rules out."""
        return self._free.pop()

    def give_back(self, buffer: Tensor) -> None:
        """Ends the use of a buffer."""
        self._free.append(buffer)
