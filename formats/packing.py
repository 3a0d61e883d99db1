"""The tile packings (docs/format.md, "Tiles"): pack, unpack, dequantize. The reference for every
kernel.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.plain_packing import PLAIN_PACKINGS, PlainPacking

TILE_ROWS = 32
HALF_ROWS = 16
BLOCK_COLUMNS = 256
HEAD_BYTES = 128


@dataclass(frozen=True)
class Packing:
    """One way to store a matrix as a stream of tiles of 32 rows.

    A superblock of 256 columns is `chunks` chunks; in a chunk, `planes` groups lie side by side in
    the bits of each code byte. Group `chunks_before * planes + plane` holds `group_size`
    consecutive columns. Nibble scales (`scale_bits` 4) hold S and M unsigned; byte scales hold S
    unsigned and M signed.
    """

    name: str
    nbits: int
    group_size: int
    scale_bits: int
    chunks: int
    row_major_scales: bool
    """Whether S and M stand at 4·row + plane, or at 16·plane + row."""

    dtype = "U8"
    torch_dtype = torch.uint8
    rows_each = TILE_ROWS
    """Rows of the matrix in one row of the tensor that holds it."""

    @property
    def planes(self) -> int:
        return BLOCK_COLUMNS // self.group_size // self.chunks

    @property
    def vectors(self) -> int:
        """Code vectors of one chunk and row half."""
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
        """Bytes of one tile of 32 rows and `columns` input columns."""
        return HEAD_BYTES + blocks_of(columns) * self.block_bytes

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed [rows, columns] matrix."""
        return tiles_of(rows) * self.tile_bytes(columns)

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the tensor that holds a [rows, columns] matrix: [tiles, tile bytes]."""
        return tiles_of(rows), self.tile_bytes(columns)

    def weights(self, stored: Tensor, rows: int, columns: int) -> Tensor:
        """float32 [rows, columns] of tiles (uint8 [tiles, tile_bytes]); FormatError if the sizes do
        not fit.
        """
        return dequantize(unpack(stored, self, rows, columns), self.group_size)


PACKINGS: dict[str, Packing] = {
    p.name: p
    for p in (
        Packing("tile32-q2-g16-s4", 2, 16, 4, chunks=4, row_major_scales=True),
        Packing("tile32-q2-g16-s8", 2, 16, 8, chunks=4, row_major_scales=True),
        Packing("tile32-q3-g32-s4", 3, 32, 4, chunks=2, row_major_scales=True),
        Packing("tile32-q3-g64-s8", 3, 64, 8, chunks=1, row_major_scales=False),
        Packing("tile32-q4-g64-s8", 4, 64, 8, chunks=2, row_major_scales=False),
    )
}

AnyPacking = Packing | PlainPacking
ALL_PACKINGS: dict[str, AnyPacking] = {**PACKINGS, **PLAIN_PACKINGS}
"""What experts may have; the trunk's packed matrices are tiles."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized [rows, columns] matrix before packing: `w = ds·s·code − dm·m`.

    codes: uint8 [rows, columns]. s, m: int16 [rows, ceil(columns / group_size)]. ds, dm: float16
    [rows].
    """

    codes: Tensor
    s: Tensor
    m: Tensor
    ds: Tensor
    dm: Tensor


def packing_named(name: str, where: str = "packing") -> AnyPacking:
    """The packing called `name`; FormatError naming `where` if there is none."""
    if name not in ALL_PACKINGS:
        raise _unknown(name, ALL_PACKINGS, where)
    return ALL_PACKINGS[name]


def tile_packing_named(name: str, where: str = "packing") -> Packing:
    """The tile packing called `name`; FormatError naming `where` if there is none."""
    if name not in PACKINGS:
        raise _unknown(name, PACKINGS, where)
    return PACKINGS[name]


def _unknown(name: str, known: Iterable[str], where: str) -> FormatError:
    return FormatError(
        f"{where}: packing {name!r} is unknown; known are {', '.join(known)}", "update moe-convert"
    )


def tiles_of(rows: int) -> int:
    """Tiles of a matrix with `rows` rows."""
    return -(-rows // TILE_ROWS)


def blocks_of(columns: int) -> int:
    """Superblocks of a tile with `columns` columns."""
    return -(-columns // BLOCK_COLUMNS)


def pack(matrix: QuantizedMatrix, packing: Packing) -> Tensor:
    """The tiles of `matrix`: uint8 [tiles, tile_bytes]; rows and columns are padded with zeros.

    ValueError if shapes disagree, or a code, S or M is outside of what `packing` holds.
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
    lead = (tiles, 2, HALF_ROWS, blocks, packing.chunks)
    # [tile, half, row, block, chunk, plane, vector, byte]
    body = _pack_codes(codes.view(*lead, packing.planes, packing.vectors, 4), packing)
    tail = _pack_scales(s.view(*lead, packing.planes), m.view(*lead, packing.planes), packing)
    head = _padded(torch.stack([matrix.ds, matrix.dm], 1), tiles * TILE_ROWS, 2, torch.float16)
    head = head.view(tiles, 2, HALF_ROWS, 2).transpose(2, 3).contiguous().view(torch.uint8)
    blocks_bytes = torch.cat([body, tail], dim=-1).reshape(tiles, -1)
    return torch.cat([head.reshape(tiles, HEAD_BYTES), blocks_bytes], dim=1)


def unpack(tiles: Tensor, packing: Packing, rows: int, columns: int) -> QuantizedMatrix:
    """The matrix of `tiles` (uint8 [tiles, tile_bytes]); FormatError if the sizes do not fit [rows,
    columns].
    """
    n_tiles, blocks = tiles_of(rows), blocks_of(columns)
    if tuple(tiles.shape) != (n_tiles, packing.tile_bytes(columns)):
        expected = (n_tiles, packing.tile_bytes(columns))
        raise FormatError(
            f"tiles of shape {tuple(tiles.shape)}, {packing.name} [{rows}, {columns}] takes {expected}"
        )
    head = tiles[:, :HEAD_BYTES].contiguous().view(torch.float16).view(n_tiles, 2, 2, HALF_ROWS)
    head = head.transpose(2, 3).reshape(n_tiles * TILE_ROWS, 2)[:rows]
    chunks = tiles[:, HEAD_BYTES:].reshape(n_tiles, blocks, packing.chunks, -1)
    scale_bytes = TILE_ROWS * packing.planes * 2 * packing.scale_bits // 8
    codes = _unpack_codes(chunks[..., :-scale_bytes], packing)
    s, m = _unpack_scales(chunks[..., -scale_bytes:], packing)
    groups = -(-columns // packing.group_size)
    return QuantizedMatrix(
        codes.reshape(n_tiles * TILE_ROWS, -1)[:rows, :columns],
        s.reshape(n_tiles * TILE_ROWS, -1)[:rows, :groups].to(torch.int16),
        m.reshape(n_tiles * TILE_ROWS, -1)[:rows, :groups].to(torch.int16),
        head[:, 0],
        head[:, 1],
    )


def dequantize(matrix: QuantizedMatrix, group_size: int) -> Tensor:
    """float32 [rows, columns]: `ds·s·code − dm·m`. Both products are exact in float32, so it is
    rounded once.
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


def _pack_codes(codes: Tensor, packing: Packing) -> Tensor:
    """[tile, half, row, block, chunk, plane, vector, 4] -> [tile, block, chunk, bytes]."""
    if packing.nbits == 4:
        vectors = codes[..., 0, :, :] | (codes[..., 1, :, :] << 4)
    else:
        low = codes & 3
        vectors = (
            low[..., 0, :, :]
            | (low[..., 1, :, :] << 2)
            | (low[..., 2, :, :] << 4)
            | (low[..., 3, :, :] << 6)
        )
    if packing.nbits == 3:
        # Pairs of vectors, each pair followed by the top bits of both.
        top = torch.unflatten(codes >> 2, -2, (-1, 2))
        high = torch.zeros_like(top[..., 0, :, 0, :])
        for odd in (0, 1):
            high |= top[..., 3, :, odd, :] << odd
            for plane in (0, 1, 2):
                high |= top[..., plane, :, odd, :] << (2 * plane + 2 + odd)
        pairs = torch.unflatten(vectors, -2, (-1, 2))
        vectors = torch.cat([pairs, high.unsqueeze(-2)], dim=-2)  # [..., pair, 3, 4]
        order = vectors.permute(
            0, 3, 4, 5, 1, 6, 2, 7
        )  # tile, block, chunk, pair, half, 3, row, byte
    else:
        order = vectors.permute(0, 3, 4, 5, 1, 2, 6)  # tile, block, chunk, vector, half, row, byte
    return order.flatten(3)


def _unpack_codes(body: Tensor, packing: Packing) -> Tensor:
    """The inverse of `_pack_codes`: [tile, half, row, block, chunk, plane, vector, 4]."""
    if packing.nbits == 3:
        order = torch.unflatten(body, 3, (packing.vectors // 2, 2, 3, HALF_ROWS, 4))
        triple = order.permute(
            0, 4, 6, 1, 2, 3, 5, 7
        )  # tile, half, row, block, chunk, pair, 3, byte
        pairs, high = triple[..., :2, :], triple[..., 2, :]
        vectors = pairs.flatten(-3, -2)
    else:
        order = torch.unflatten(body, 3, (packing.vectors, 2, HALF_ROWS, 4))
        vectors = order.permute(0, 4, 5, 1, 2, 3, 6)
    if packing.nbits == 4:
        return torch.stack([vectors & 15, vectors >> 4], dim=5)
    planes = [(vectors >> (2 * plane)) & 3 for plane in range(4)]
    if packing.nbits == 3:
        for plane in range(4):
            shift = 2 * plane + 2 if plane < 3 else 0
            top = torch.stack([(high >> (shift + odd)) & 1 for odd in (0, 1)], dim=-2).flatten(
                -3, -2
            )
            planes[plane] = planes[plane] | (top << 2)
    return torch.stack(planes, dim=5)


def _pack_scales(s: Tensor, m: Tensor, packing: Packing) -> Tensor:
    """Two [tile, half, row, block, chunk, plane] -> [tile, block, chunk, bytes]."""
    kinds = (s | (m << 4)).unsqueeze(-1) if packing.scale_bits == 4 else torch.stack([s, m], dim=-1)
    inner = (2, 5) if packing.row_major_scales else (5, 2)
    return kinds.permute(0, 3, 4, 1, 6, *inner).flatten(
        3
    )  # tile, block, chunk, half, kind, then row and plane


def _unpack_scales(scales: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack_scales`; s is uint8, m is uint8 or int8."""
    kinds = 1 if packing.scale_bits == 4 else 2
    if packing.row_major_scales:
        order = torch.unflatten(scales, 3, (2, kinds, HALF_ROWS, packing.planes)).permute(
            4, 0, 3, 5, 1, 2, 6
        )
    else:
        order = torch.unflatten(scales, 3, (2, kinds, packing.planes, HALF_ROWS)).permute(
            4, 0, 3, 6, 1, 2, 5
        )
    if packing.scale_bits == 4:
        return order[0] & 15, order[0] >> 4
    return order[0], order[1].contiguous().view(torch.int8)
