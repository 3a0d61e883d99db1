"""Memory for packed experts: a fixed number of equal buffers, taken and given back, in pieces that
can be given up.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.reading.reader import aligned_bytes


def buffer_bytes(n_bytes: int) -> int:
    """What an expert of `n_bytes` takes in a buffer: whole pages."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, eq=False)
class Memory:
    """Where buffers come from: `allocate` gives uint8 [n_bytes] on a page boundary; at most
    `piece_bytes` at a time, if a buffer is not larger; None: all at once. With `lazy`, each piece
    when its first buffer is taken.
    """

    allocate: Callable[[int], Tensor]
    piece_bytes: int | None = None
    lazy: bool = False


RAM = Memory(aligned_bytes)
"""The system backs it when it is first written."""


@dataclass(eq=False)
class Piece:
    """One allocation: its `count` buffers, of which `free` are not taken."""

    memory: Tensor
    count: int
    free: list[Tensor] = field(default_factory=list)


class BufferPool:
    """`count` page-aligned buffers for experts of up to `n_bytes`. Errors as `Memory.allocate`.

    Not thread safe: its owner has a lock.
    """

    def __init__(self, n_bytes: int, count: int, memory: Memory = RAM) -> None:
        self.buffer_bytes = buffer_bytes(n_bytes)
        self.pieces: list[Piece] = []
        self._piece_of: dict[int, Piece] = {}
        """By address of the buffer."""
        self._memory, self._count = memory, count
        self._unallocated = count
        while self._unallocated and not memory.lazy:
            self._add_piece()

    @property
    def is_empty(self) -> bool:
        """Whether no buffer is left."""
        return not self._unallocated and not any(piece.free for piece in self.pieces)

    def take(self) -> Tensor:
        """A buffer, uint8; IndexError if none is left, which its owner's counting rules out."""
        if not any(piece.free for piece in self.pieces):
            self._add_piece()
        # From the fullest one, so that others become empty.
        return min(
            (piece for piece in self.pieces if piece.free), key=lambda piece: len(piece.free)
        ).free.pop()

    def give_back(self, buffer: Tensor) -> None:
        """Ends the use of a buffer."""
        self._piece_of[buffer.data_ptr()].free.append(buffer)

    def piece_of(self, buffer: Tensor) -> Piece:
        """The piece that the buffer is of."""
        return self._piece_of[buffer.data_ptr()]

    def drop(self, piece: Piece) -> None:
        """Gives up a piece of which no buffer is taken; its memory is free when the caller drops it
        too.
        """
        if len(piece.free) != piece.count:
            raise ValueError(f"{piece.count - len(piece.free)} buffers of the piece are in use")
        for buffer in piece.free:
            del self._piece_of[buffer.data_ptr()]
        piece.free.clear()
        self.pieces.remove(piece)
        self._count -= piece.count

    def mend(self, taken: Iterable[Tensor]) -> None:
        """Makes it consistent, whatever was done of a change: the buffers that are not `taken` are
        free.
        """
        addresses = {buffer.data_ptr() for buffer in taken}
        self._piece_of.clear()
        for piece in self.pieces:
            buffers = self._buffers(piece)
            self._piece_of.update((buffer.data_ptr(), piece) for buffer in buffers)
            piece.free = [buffer for buffer in buffers if buffer.data_ptr() not in addresses]
        self._unallocated = max(0, self._count - sum(piece.count for piece in self.pieces))

    def _buffers(self, piece: Piece) -> list[Tensor]:
        size = self.buffer_bytes
        return [piece.memory[begin : begin + size] for begin in range(0, size * piece.count, size)]

    def _add_piece(self) -> None:
        if not self._unallocated:
            raise IndexError("no buffer is left")
        size, most = self.buffer_bytes, self._memory.piece_bytes
        count = self._unallocated if most is None else min(self._unallocated, max(1, most // size))
        piece = Piece(self._memory.allocate(size * count), count)
        piece.free = self._buffers(piece)
        self._piece_of.update((buffer.data_ptr(), piece) for buffer in piece.free)
        self.pieces.append(piece)
        self._unallocated -= count
