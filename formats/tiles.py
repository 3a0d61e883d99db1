"""Packs matrices to tiles, unpacks and dequantizes them (docs/format.md, "Tiles").

This is the reference: kernels on CPU and GPU give the same codes and scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.expert import ExpertLayout, split
from formats.packing import (
    BLOCK_COLUMNS,
    HALF_ROWS,
    HEAD_BYTES,
    TILE_ROWS,
    AnyPacking,
    Packing,
    blocks_of,
    tiles_of,
)
from formats.tile_bits import pack_codes, pack_scales, unpack_codes, unpack_scales


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized [rows, columns] matrix before packing: `w = ds·s·code − dm·m`."""

    codes: Tensor
    """uint8 [rows, columns]"""
    s: Tensor
    """int16 [rows, ceil(columns / group_size)]"""
    m: Tensor
    """int16 [rows, ceil(columns / group_size)]"""
    ds: Tensor
    """float16 [rows]"""
    dm: Tensor
    """float16 [rows]"""


def pack(matrix: QuantizedMatrix, packing: Packing) -> Tensor:
    """Pack a matrix to tiles, uint8 [tiles, tile bytes]. Padding rows and columns are zero.

    Raises ValueError if shapes disagree, or a code, S or M is out of the packing's range.
    """
    rows, columns = matrix.codes.shape
    scales = (rows, -(-columns // packing.group_size))
    _require(matrix.codes, "codes", (rows, columns), 0, packing.max_code)
    _require(matrix.s, "s", scales, 0, packing.max_s)
    _require(matrix.m, "m", scales, packing.min_m, packing.max_m)
    tiles, blocks = tiles_of(rows), blocks_of(columns)
    groups = BLOCK_COLUMNS // packing.group_size
    codes = _padded(matrix.codes, tiles * TILE_ROWS, blocks * BLOCK_COLUMNS, torch.uint8)
    s = _padded(matrix.s, tiles * TILE_ROWS, blocks * groups, torch.uint8)
    m = _padded(matrix.m, tiles * TILE_ROWS, blocks * groups, torch.int8).view(torch.uint8)
    chunk_shape = (tiles, 2, HALF_ROWS, blocks, packing.chunks, packing.planes)
    code_bytes = pack_codes(codes.view(*chunk_shape, packing.vectors, 4), packing.nbits)
    scale_bytes = pack_scales(
        s.view(chunk_shape), m.view(chunk_shape), packing.scale_bits, packing.row_major_scales
    )
    body = torch.cat([code_bytes, scale_bytes], dim=-1).reshape(tiles, -1)
    head = _padded(torch.stack([matrix.ds, matrix.dm], 1), tiles * TILE_ROWS, 2, torch.float16)
    head = head.view(tiles, 2, HALF_ROWS, 2).transpose(2, 3).contiguous().view(torch.uint8)
    return torch.cat([head.reshape(tiles, HEAD_BYTES), body], dim=1)


def unpack(tiles: Tensor, packing: Packing, rows: int, columns: int) -> QuantizedMatrix:
    """Unpack tiles (uint8 [tiles, tile bytes]) to a [rows, columns] matrix.

    Raises FormatError if the tiles have another shape.
    """
    n_tiles, blocks = tiles_of(rows), blocks_of(columns)
    expected = packing.stored_shape(rows, columns)
    if tuple(tiles.shape) != expected:
        raise FormatError(
            f"tiles of shape {tuple(tiles.shape)},"
            f" {packing.name} [{rows}, {columns}] takes {expected}"
        )
    head = tiles[:, :HEAD_BYTES].contiguous().view(torch.float16).view(n_tiles, 2, 2, HALF_ROWS)
    head = head.transpose(2, 3).reshape(n_tiles * TILE_ROWS, 2)[:rows]
    chunks = tiles[:, HEAD_BYTES:].reshape(n_tiles, blocks, packing.chunks, -1)
    scale_bytes = TILE_ROWS * packing.planes * 2 * packing.scale_bits // 8
    codes = unpack_codes(chunks[..., :-scale_bytes], packing.nbits, packing.vectors)
    s, m = unpack_scales(
        chunks[..., -scale_bytes:], packing.scale_bits, packing.planes, packing.row_major_scales
    )
    groups = -(-columns // packing.group_size)
    return QuantizedMatrix(
        codes.reshape(n_tiles * TILE_ROWS, -1)[:rows, :columns],
        s.reshape(n_tiles * TILE_ROWS, -1)[:rows, :groups].to(torch.int16),
        m.reshape(n_tiles * TILE_ROWS, -1)[:rows, :groups].to(torch.int16),
        head[:, 0],
        head[:, 1],
    )


def dequantize(matrix: QuantizedMatrix, group_size: int) -> Tensor:
    """Compute `ds·s·code − dm·m`, float32 [rows, columns].

    Both products are exact in float32; only the difference is rounded.
    """
    rows, columns = matrix.codes.shape
    scale = matrix.ds.float()[:, None] * matrix.s
    minimum = matrix.dm.float()[:, None] * matrix.m
    padding = matrix.s.shape[1] * group_size - columns
    codes = torch.nn.functional.pad(matrix.codes, (0, padding)).view(rows, -1, group_size)
    weights = torch.addcmul(-minimum[:, :, None], codes.float(), scale[:, :, None])
    return weights.view(rows, -1)[:, :columns]


def matrix_weights(packing: AnyPacking, stored: Tensor, rows: int, columns: int) -> Tensor:
    """Return the weights of a stored matrix, float32 [rows, columns].

    stored: the packing's dtype and `stored_shape`. Raises FormatError if tiles have another size.
    """
    if not isinstance(packing, Packing):
        return stored.float()
    return dequantize(unpack(stored, packing, rows, columns), packing.group_size)


def expert_weights(layout: ExpertLayout, blob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantize an expert's bytes to gate, up and down.

    All are float32: gate and up [intermediate, hidden], down [hidden, intermediate].
    """
    gate, up, down = split(layout, blob)
    return (
        matrix_weights(layout.gate_up, gate, layout.intermediate, layout.hidden),
        matrix_weights(layout.gate_up, up, layout.intermediate, layout.hidden),
        matrix_weights(layout.down, down, layout.hidden, layout.intermediate),
    )


def _require(values: Tensor, name: str, shape: tuple[int, int], low: int, high: int) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} of shape {list(values.shape)}, expected {list(shape)}")
    smallest, largest = (int(v) for v in values.aminmax())
    if smallest < low or largest > high:
        raise ValueError(f"{name} from {smallest} to {largest}, the packing holds {low} to {high}")


def _padded(values: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    result = torch.zeros(rows, columns, dtype=dtype)
    result[: values.shape[0], : values.shape[1]] = values
    return result
