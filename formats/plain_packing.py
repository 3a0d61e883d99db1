"""The packings of unquantized weights: plain 16-bit rows (docs/format.md, "Rows").

Rows have no padding, head or scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlainPacking:
    """A matrix as [rows, columns] of a 16-bit float.

    Its methods and attributes have the names of their counterparts in `formats.packing.Packing`.
    """

    name: str
    dtype: str
    """Dtype of the tensor in the file, in safetensors' notation."""
    torch_dtype: torch.dtype

    nbits = 16
    rows_each = 1
    """Rows of the matrix in one row of the stored tensor."""

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the stored [rows, columns] matrix: the same."""
        return rows, columns

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Return the size of a [rows, columns] matrix in bytes."""
        return 2 * rows * columns

    def weights(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """Convert the stored tensor (`torch_dtype` [rows, columns]) to float32."""
        return stored.float()


PLAIN_PACKINGS: dict[str, PlainPacking] = {
    packing.name: packing
    for packing in (
        PlainPacking("rows-bf16", "BF16", torch.bfloat16),
        PlainPacking("rows-f16", "F16", torch.float16),
    )
}
