"""Weights that are too large for a packing or for float32's sums: which one it is, and where."""

from collections.abc import Iterator

import torch
from torch import Tensor

from converter.source import Checkpoint, Weight

ROWS_AT_ONCE = 1024


def largest_of(checkpoint: Checkpoint, weight: Weight, begin: int, rows: Tensor) -> tuple[float, str]:
    """Return the largest magnitude among `rows`, read from row `begin` on, and a clause that names it."""
    size = rows.float().abs().nan_to_num(nan=torch.inf)
    place = [int(index) for index in torch.unravel_index(size.argmax(), size.shape)]
    value = float(rows[tuple(place)])
    place[0] += begin
    return float(size.max()), f"{checkpoint.place_of(weight)}: its largest weight is {value:.6g}, at {place}"


def largest_in_layer(checkpoint: Checkpoint, layer: int) -> str:
    """Return a clause that names the largest weight of `layer`; reads all of them."""
    return max(_of_pieces(checkpoint, layer))[1]


def _of_pieces(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[float, str]]:
    prefix = f"model.layers.{layer}."
    trunk = [weight for name, weight in checkpoint.trunk.items() if name.startswith(prefix)]
    for weight in (*trunk, *(weight for key, weight in checkpoint.experts.items() if key.layer == layer)):
        for begin in range(0, weight.shape[0], ROWS_AT_ONCE):
            rows = checkpoint.read_rows(weight, begin, min(begin + ROWS_AT_ONCE, weight.shape[0]))
            yield largest_of(checkpoint, weight, begin, rows)
