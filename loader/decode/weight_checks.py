"""Checks that weights fit together, for the decoders of CPU and GPU. Each raises ValueError."""

import torch
from torch import Tensor

from formats.packing import tile_packing_named
from loader.arithmetic.kernels import PackedMatrix


def check_dense(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless the tensor is contiguous, of this shape and dtype."""
    if tensor.dtype is not dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {dtype} {shape}, got {tuple(tensor.shape)} {tensor.dtype}"
        )


def check_matrix(name: str, matrix: PackedMatrix, columns: int, rows: int | None = None) -> None:
    """Raise ValueError unless the matrix has contiguous tiles for all its rows.

    rows: expected number of rows; None: any.
    """
    expected = matrix.rows if rows is None else rows
    need = tile_packing_named(matrix.packing).matrix_bytes(expected, columns)
    tiles = matrix.tiles
    if matrix.rows != expected or tiles.numel() < need or not tiles.is_contiguous():
        raise ValueError(
            f"{name}: {matrix.rows} rows in {tiles.numel()} bytes;"
            f" expected {expected} x {columns} in {need} contiguous bytes"
        )
