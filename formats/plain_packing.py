"""The packings of weights left as they are: plain rows, without padding, head or scales
(docs/format.md, "Rows").
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlainPacking:
    """A matrix as [rows, columns] of a 16-bit float; what it has in common with
    `formats.packing.Packing` has the same names.
    """

    name: str
    dtype: str
    """Of the tensor in the file, as safetensors calls it."""
    torch_dtype: torch.dtype

    nbits = 16
    rows_each = 1

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the tensor that holds a [rows, columns] matrix: the same."""
        return rows, columns

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a [rows, columns] matrix."""
        return 2 * rows * columns

    def weights(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """float32 [rows, columns] of what is stored, of `torch_dtype` and the same shape."""
        return stored.float()


PLAIN_PACKINGS: dict[str, PlainPacking] = {
    p.name: p
    for p in (
        PlainPacking("rows-bf16", "BF16", torch.bfloat16),
        PlainPacking("rows-f16", "F16", torch.float16),
    )
}
