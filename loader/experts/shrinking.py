"""Frees slots, so that something else can use their memory."""

from collections.abc import Callable, Sequence

from torch import Tensor

from loader.experts.buffers import Piece
from loader.experts.slots import LayerSlots


def free_slots(
    layers: Sequence[LayerSlots], n_bytes: int, before_free: Callable[[Tensor], None]
) -> int:
    """Free at least `n_bytes` of the slots of `layers` if so much is not in use. Return the bytes.

    Memory is freed in whole pieces (loader/experts/buffers.py), the emptiest piece first. The
    experts in a piece are evicted. The slots are taken from the layers that have the most. The
    staging area keeps its size. `before_free` is called with the memory of each piece.
    Called with the lock of `layers` held.
    """
    for slots in layers:
        slots.drop_guesses(fills=True)
    freed_bytes = 0
    while freed_bytes < n_bytes and (chosen := _emptiest_piece(layers)):
        piece, users = chosen
        for slots in users:
            slots.clear(piece)
        for _ in range(piece.count):
            _remove_one_slot(users)
        pool = users[0].staging.pool
        if pool is not None:
            pool.drop(piece)
        before_free(piece.memory)
        freed_bytes += piece.memory.numel()
    return freed_bytes


def _emptiest_piece(layers: Sequence[LayerSlots]) -> tuple[Piece, list[LayerSlots]] | None:
    """Return the emptiest piece that is not in use, and the layers that share its pool."""
    candidates = []
    for staging in {id(slots.staging): slots.staging for slots in layers}.values():
        users = [slots for slots in layers if slots.staging is staging]
        removable = sum(slots.removable_slots for slots in users)
        for piece in staging.pool.pieces if staging.pool else ():
            if piece.count <= removable and not any(slots.uses(piece) for slots in users):
                candidates.append((piece, users))
    return max(candidates, key=lambda each: len(each[0].free) / each[0].count, default=None)


def _remove_one_slot(layers: Sequence[LayerSlots]) -> None:
    # The layer with the most slots; among equals the one with the most empty slots.
    order = sorted(layers, key=lambda slots: (-slots.slots, len(slots.cached) - slots.slots))
    if not any(slots.remove_slot() for slots in order):
        raise RuntimeError("all slots are in use; none can be removed")
