"""One matrix or vector of a checkpoint, and the bytes of a shard that hold it."""

from dataclasses import dataclass
from math import prod

import torch

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The dtypes that are read, by safetensors' names."""


@dataclass(frozen=True)
class Weight:
    """A matrix [rows, columns] or a vector, from byte `offset` of a shard on.

    It may be a part of a stored tensor. origin: the indices of its first row there. dtype:
    safetensors' name.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    origin: tuple[int, ...] = (0,)

    def place(self, row: int, *rest: int) -> list[int]:
        """Return the indices of an element in the stored tensor."""
        return [*self.origin[:-1], self.origin[-1] + row, *rest]

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self.dtype == "F32" else 2

    @property
    def n_bytes(self) -> int:
        """Bytes of all numbers."""
        return prod(self.shape) * self.item_bytes
