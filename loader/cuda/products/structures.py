"""Structures of kernel arguments, passed by value, as loader/cuda/kernels declares them.

They hold addresses: the caller keeps the tensors alive until the kernel has run.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from formats.packing import Packing

MAX_MATRICES = 4
MAX_EXPERTS = 8


@dataclass(frozen=True)
class LinearMatrix:
    """A packed matrix of `rows` rows, and the float32 [rows] that its product is written to."""

    tiles: Tensor
    packing: Packing
    rows: int
    y: Tensor


class Matrices(ctypes.Structure):
    """Several matrices over the same columns (gemv.cuh)."""

    _fields_ = (
        ("tiles", ctypes.c_void_p * MAX_MATRICES),
        ("y", ctypes.c_void_p * MAX_MATRICES),
        ("rows", ctypes.c_int64 * MAX_MATRICES),
        ("count", ctypes.c_int64),
    )

    @classmethod
    def pack(cls, matrices: Sequence[LinearMatrix]) -> "Matrices":
        """Return the structure for these matrices, at most MAX_MATRICES of one packing."""
        structure = cls(count=len(matrices))
        for i, matrix in enumerate(matrices):
            structure.tiles[i] = matrix.tiles.data_ptr()
            structure.y[i] = matrix.y.data_ptr()
            structure.rows[i] = matrix.rows
        return structure


class Experts(ctypes.Structure):
    """One token's experts (experts.cuh)."""

    _fields_ = (("blob", ctypes.c_void_p * MAX_EXPERTS), ("rank", ctypes.c_int64 * MAX_EXPERTS))

    def set(self, experts: Sequence[tuple[int, Tensor]]) -> None:
        """Set (rank, blob) of each expert."""
        for i, (rank, blob) in enumerate(experts):
            self.rank[i] = rank
            self.blob[i] = blob.data_ptr()


class DownShape(ctypes.Structure):
    """Sizes of the down products of one token's experts (experts.cuh)."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
    )


class Groups(ctypes.Structure):
    """Rows of activations in groups, one group for each expert (gemm.cuh).

    Group i has the rows [pair[i], pair[i + 1]) and the grid's blocks [token_tile[i],
    token_tile[i + 1]).
    """

    _fields_ = (
        ("blob", ctypes.c_void_p * MAX_EXPERTS),
        ("pair", ctypes.c_int64 * (MAX_EXPERTS + 1)),
        ("token_tile", ctypes.c_int64 * (MAX_EXPERTS + 1)),
        ("count", ctypes.c_int64),
    )

    @classmethod
    def pack(cls, groups: Sequence[tuple[Tensor, int]], tile_tokens: int) -> "Groups":
        """Return the structure for (blob, rows) of each group, `tile_tokens` rows a block."""
        structure = cls(count=len(groups))
        for i, (blob, rows) in enumerate(groups):
            structure.blob[i] = blob.data_ptr()
            structure.pair[i + 1] = structure.pair[i] + rows
            structure.token_tile[i + 1] = structure.token_tile[i] + -(-rows // tile_tokens)
        return structure

    @property
    def token_tiles(self) -> int:
        """Number of the grid's blocks for all groups."""
        return int(self.token_tile[self.count])


class PairLists(ctypes.Structure):
    """The pairs of each token, and the range of pairs in one pass (gemm.cuh)."""

    _fields_ = (
        ("place", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("begin", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
    )
