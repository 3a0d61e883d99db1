"""Memory for packed experts: a pool of equal buffers, allocated in pieces that can be freed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.reading.reader import aligned_bytes


def buffer_bytes(n_bytes: int) -> int:
    """Return the size of a buffer for an expert of `n_bytes`: whole pages, in bytes."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, eq=False)
class Memory:
    """An allocator for the buffers of a pool.

    allocate: returns uint8 [n_bytes] on a page boundary.
    piece_bytes: largest allocation, at least one buffer; None: one allocation for all buffers.
    lazy: True allocates a piece when its first buffer is taken.
    """

    allocate: Callable[[int], Tensor]
    piece_bytes: int | None = None
    lazy: bool = False


RAM = Memory(aligned_bytes)
"""Plain RAM; the system backs each page when it is first written."""


@dataclass(eq=False)
class Piece:
    """One allocation of `count` buffers; `free` holds those that are not taken."""

    memory: Tensor
    count: int
    free: list[Tensor] = field(default_factory=list)


class BufferPool:
    """`count` page-aligned buffers for experts of up to `n_bytes` bytes.

    Not thread safe: the owner has a lock. Raises the errors of `Memory.allocate`.
    """

    def __init__(self, n_bytes: int, count: int, memory: Memory = RAM) -> None:
        self.buffer_bytes = buffer_bytes(n_bytes)
        self.pieces: list[Piece] = []
        self._piece_of: dict[int, Piece] = {}
        """Piece by address of the buffer."""
        self._memory = memory
        self._count = count
        self._unallocated = count
        while self._unallocated and not memory.lazy:
            self._add_piece()

    @property
    def is_empty(self) -> bool:
        """True if no buffer is left."""
        return not self._unallocated and not any(piece.free for piece in self.pieces)

    def take(self) -> Tensor:
        """Take a buffer, uint8 [buffer_bytes]. IndexError if none is left; the owner counts."""
        if not any(piece.free for piece in self.pieces):
            self._add_piece()
        # From the fullest piece, so that other pieces become empty and can be freed.
        pieces = [piece for piece in self.pieces if piece.free]
        return min(pieces, key=lambda piece: len(piece.free)).free.pop()

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer to the pool."""
        self._piece_of[buffer.data_ptr()].free.append(buffer)

    def piece_of(self, buffer: Tensor) -> Piece:
        """Return the piece that contains the buffer."""
        return self._piece_of[buffer.data_ptr()]

    def drop(self, piece: Piece) -> None:
        """Remove a piece without taken buffers. ValueError if one is taken.

        The memory is freed once the caller drops the piece too.
        """
        if len(piece.free) != piece.count:
            raise ValueError(f"{piece.count - len(piece.free)} buffers of the piece are in use")
        for buffer in piece.free:
            del self._piece_of[buffer.data_ptr()]
        piece.free.clear()
        self.pieces.remove(piece)
        self._count -= piece.count

    def repair(self, taken: Iterable[Tensor]) -> None:
        """Make the pool consistent after an interrupt: all buffers but `taken` are free."""
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
        size = self.buffer_bytes
        count = self._unallocated
        if self._memory.piece_bytes is not None:
            count = min(count, max(1, self._memory.piece_bytes // size))
        piece = Piece(self._memory.allocate(size * count), count)
        piece.free = self._buffers(piece)
        self._piece_of.update((buffer.data_ptr(), piece) for buffer in piece.free)
        self.pieces.append(piece)
        self._unallocated -= count
