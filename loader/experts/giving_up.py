"""Slots given up, so that their memory can be something else's."""

from collections.abc import Callable, Sequence

from torch import Tensor

from loader.experts.buffers import Piece
from loader.experts.slots import LayerSlots


def give_up(
    layers: Sequence[LayerSlots], n_bytes: int, before_free: Callable[[Tensor], None]
) -> int:
    """Frees at least `n_bytes` of the buffers of `layers`, if so much is not in use; how many
    bytes.

    Whole pieces (loader/experts/buffers.py), those with the fewest experts first; the experts in
    them are dropped, and so many slots, of the layers with the most. What is aside keeps its room.
    `before_free` is called with each piece's memory. With the lock of `layers` held.
    """
    for slots in layers:
        slots.drop_guesses(fills=True)
    freed = 0
    while freed < n_bytes and (chosen := _piece_to_give_up(layers)):
        piece, users = chosen
        for slots in users:
            slots.clear(piece)
        for _ in range(piece.count):
            _lower_one(users)
        pool = users[0].aside.pool
        if pool is not None:
            pool.drop(piece)
        before_free(piece.memory)
        freed += piece.memory.numel()
    return freed


def _piece_to_give_up(layers: Sequence[LayerSlots]) -> tuple[Piece, list[LayerSlots]] | None:
    """A piece of which nothing is in use, and the layers that may have experts in it."""
    found = []
    for side in {id(slots.aside): slots.aside for slots in layers}.values():
        users = [slots for slots in layers if slots.aside is side]
        lowest = sum(slots.most_to_lower for slots in users)
        for piece in side.pool.pieces if side.pool else ():
            if piece.count <= lowest and not any(slots.uses(piece) for slots in users):
                found.append((piece, users))
    return max(found, key=lambda each: len(each[0].free) / each[0].count, default=None)


def _lower_one(layers: Sequence[LayerSlots]) -> None:
    # Of equals one that has an empty slot.
    order = sorted(layers, key=lambda slots: (-slots.slots, len(slots.held) - slots.slots))
    if not any(slots.lower() for slots in order):
        raise RuntimeError("no slot can be given up")
