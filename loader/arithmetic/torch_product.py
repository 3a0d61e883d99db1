"""The reference products in torch: float32, with weights dequantized a few rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from formats.packing import AnyPacking
from formats.tiles import matrix_weights

CHUNK_WEIGHTS = 1 << 22
"""Weights dequantized at a time: 16 MiB in float32, for tiles about 80 MiB with temporaries."""


def chunks(
    stored: Tensor, packing: AnyPacking, rows: int, columns: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a stored matrix [rows, columns] in groups of rows: (slice of rows, float32 weights).

    stored: uint8 [tiles, tile_bytes], or plain rows of the packing's dtype.
    """
    step = max(1, CHUNK_WEIGHTS // (packing.rows_each * columns))
    for begin in range(0, stored.shape[0], step):
        first = begin * packing.rows_each
        last = min(first + step * packing.rows_each, rows)
        yield (
            slice(first, last),
            matrix_weights(packing, stored[begin : begin + step], last - first, columns),
        )


def product(stored: Tensor, packing: AnyPacking, rows: int, columns: int, x: Tensor) -> Tensor:
    """Return x [T, columns] · Wᵀ, float32 [T, rows], of a stored matrix W [rows, columns]."""
    # Autocast would round x and W to 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        parts = [
            functional.linear(x, weights) for _, weights in chunks(stored, packing, rows, columns)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def input_gradient(
    stored: Tensor, packing: AnyPacking, rows: int, columns: int, grad: Tensor
) -> Tensor:
    """Return the gradient of x in `product`: grad [T, rows] · W, float32 [T, columns]."""
    result = grad.new_zeros(len(grad), columns)
    for part, weights in chunks(stored, packing, rows, columns):
        result.addmm_(grad[:, part], weights)
    return result
