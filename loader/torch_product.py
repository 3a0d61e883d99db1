"""The reference product in torch: float32, of weights that become float32 a few at a time."""

import torch
from torch import Tensor
from torch.nn import functional

from formats.packing import AnyPacking

CHUNK_WEIGHTS = 1 << 22
"""Weights that become float32 at a time: 16 MiB, of tiles some 80 MiB with the steps in between."""


def product(stored: Tensor, packing: AnyPacking, rows: int, columns: int, x: Tensor) -> Tensor:
    """x [T, columns] · Wᵀ, float32 [T, rows], of the [rows, columns] matrix W as `packing` stores it: uint8 [tiles,
    tile_bytes], or rows of the packing's dtype."""
    step = max(1, CHUNK_WEIGHTS // (packing.rows_each * columns))
    parts = []
    for begin in range(0, stored.shape[0], step):
        part_rows = min(step * packing.rows_each, rows - begin * packing.rows_each)
        parts.append(functional.linear(x, packing.weights(stored[begin : begin + step], part_rows, columns)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
