"""The tile packings (docs/format.md, "Tiles"): pack, unpack, dequantize.

This is the reference: kernels on CPU and GPU give the same codes and scales.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.plain_packing import PLAIN_PACKINGS, PlainPacking
from formats.tile_bits import HALF_ROWS, pack_codes, pack_scales, unpack_codes, unpack_scales

TILE_ROWS = 2 * HALF_ROWS
BLOCK_COLUMNS = 256
HEAD_BYTES = 128


@dataclass(frozen=True)
class Packing:
    """A layout of a matrix as a sequence of tiles of 32 rows.

    A superblock of 256 columns has `chunks` chunks. Each code byte of a chunk holds one code of
    each of its `planes` groups. A group has `group_size` consecutive columns; its number in the
    superblock is chunk · planes + plane. With `scale_bits` 4, S and M are unsigned; with 8, S is
    unsigned and M is signed.
    """

    name: str
    nbits: int
    group_size: int
    scale_bits: int
    chunks: int
    row_major_scales: bool
    """True: S and M are stored row by row, at planes·row + plane. False: at 16·plane + row."""

    dtype = "U8"
    torch_dtype = torch.uint8
    rows_each = TILE_ROWS
    """Rows of the matrix in one row of the stored tensor."""

    @property
    def planes(self) -> int:
        return BLOCK_COLUMNS // self.group_size // self.chunks

    @property
    def vectors(self) -> int:
        """Code vectors of one chunk in one half of the tile's rows."""
        return self.group_size // 4

    @property
    def max_code(self) -> int:
        return (1 << self.nbits) - 1

    @property
    def max_s(self) -> int:
        return (1 << self.scale_bits) - 1

    @property
    def min_m(self) -> int:
        return 0 if self.scale_bits == 4 else -127

    @property
    def max_m(self) -> int:
        return 15 if self.scale_bits == 4 else 127

    @property
    def block_bytes(self) -> int:
        groups = BLOCK_COLUMNS // self.group_size
        return TILE_ROWS * (BLOCK_COLUMNS * self.nbits + groups * 2 * self.scale_bits) // 8

    def tile_bytes(self, columns: int) -> int:
        """Return the size of a tile of `columns` input columns in bytes."""
        return HEAD_BYTES + blocks_of(columns) * self.block_bytes

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Return the size of a packed [rows, columns] matrix in bytes."""
        return tiles_of(rows) * self.tile_bytes(columns)

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the stored [rows, columns] matrix: [tiles, tile bytes]."""
        return tiles_of(rows), self.tile_bytes(columns)

    def weights(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """Dequantize tiles (uint8 [tiles, tile bytes]) to float32 [rows, columns].

        Raises FormatError if the tiles have another size.
        """
        return dequantize(unpack(stored, self, rows, columns), self.group_size)


PACKINGS: dict[str, Packing] = {
    packing.name: packing
    for packing in (
        Packing("tile32-q2-g16-s4", 2, 16, 4, chunks=4, row_major_scales=True),
        Packing("tile32-q2-g16-s8", 2, 16, 8, chunks=4, row_major_scales=True),
        Packing("tile32-q3-g32-s4", 3, 32, 4, chunks=2, row_major_scales=True),
        Packing("tile32-q3-g64-s8", 3, 64, 8, chunks=1, row_major_scales=False),
        Packing("tile32-q4-g64-s8", 4, 64, 8, chunks=2, row_major_scales=False),
    )
}

AnyPacking = Packing | PlainPacking
ALL_PACKINGS: dict[str, AnyPacking] = {**PACKINGS, **PLAIN_PACKINGS}
"""Packings of experts. Packed matrices of the trunk are always tiles (`PACKINGS`)."""


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


def packing_named(name: str, where: str = "packing") -> AnyPacking:
    """Look up a packing by name. Raises FormatError, with `where` in its message, if unknown."""
    if name not in ALL_PACKINGS:
        raise _unknown(name, ALL_PACKINGS, where)
    return ALL_PACKINGS[name]


def tile_packing_named(name: str, where: str = "packing") -> Packing:
    """Look up a tile packing by name; errors as in `packing_named`."""
    if name not in PACKINGS:
        raise _unknown(name, PACKINGS, where)
    return PACKINGS[name]


def _unknown(name: str, known: Iterable[str], where: str) -> FormatError:
    return FormatError(
        f"{where}: packing {name!r} is unknown; known are {', '.join(known)}", "update moe-convert"
    )


def tiles_of(rows: int) -> int:
    """Return the number of tiles of a matrix with `rows` rows."""
    return -(-rows // TILE_ROWS)


def blocks_of(columns: int) -> int:
    """Return the number of superblocks of a tile with `columns` columns."""
    return -(-columns // BLOCK_COLUMNS)


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
