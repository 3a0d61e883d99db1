"""The structures among kernels' parameters, as the kernels declare them: addresses and numbers,
passed by value.
"""

import ctypes
from collections.abc import Sequence

from torch import Tensor

MOST_MATRICES = 4
MOST_EXPERTS = 8


class Matrices(ctypes.Structure):
    """Several matrices over the same columns (gemv.cuh)."""

    _fields_ = (
        ("tiles", ctypes.c_void_p * MOST_MATRICES),
        ("y", ctypes.c_void_p * MOST_MATRICES),
        ("rows", ctypes.c_int64 * MOST_MATRICES),
        ("count", ctypes.c_int64),
    )

    @classmethod
    def of(cls, matrices: Sequence[tuple[Tensor, Tensor, int]]) -> "Matrices":
        """Of (tiles, y, rows)."""
        made = cls(count=len(matrices))
        for i, (tiles, y, rows) in enumerate(matrices):
            made.tiles[i], made.y[i], made.rows[i] = tiles.data_ptr(), y.data_ptr(), rows
        return made


class Experts(ctypes.Structure):
    """One token's experts (experts.cuh)."""

    _fields_ = (("blob", ctypes.c_void_p * MOST_EXPERTS), ("rank", ctypes.c_int64 * MOST_EXPERTS))

    def set(self, experts: Sequence[tuple[int, Tensor]]) -> None:
        """To these (rank, blob)."""
        for i, (rank, blob) in enumerate(experts):
            self.rank[i], self.blob[i] = rank, blob.data_ptr()


class Groups(ctypes.Structure):
    """Rows of activations in groups, one for each expert (gemm.cuh). Group i: rows pair[i] to
    pair[i + 1], which take the blocks token_tile[i] to token_tile[i + 1] of the grid.
    """

    _fields_ = (
        ("blob", ctypes.c_void_p * MOST_EXPERTS),
        ("pair", ctypes.c_int64 * (MOST_EXPERTS + 1)),
        ("token_tile", ctypes.c_int64 * (MOST_EXPERTS + 1)),
        ("count", ctypes.c_int64),
    )

    @classmethod
    def of(cls, groups: Sequence[tuple[Tensor, int]], tile_tokens: int) -> "Groups":
        """Of (blob, rows), `tile_tokens` rows a block."""
        made = cls(count=len(groups))
        for i, (blob, rows) in enumerate(groups):
            made.blob[i] = blob.data_ptr()
            made.pair[i + 1] = made.pair[i] + rows
            made.token_tile[i + 1] = made.token_tile[i] + -(-rows // tile_tokens)
        return made

    @property
    def token_tiles(self) -> int:
        """Blocks of the grid that all of them take."""
        return int(self.token_tile[self.count])
