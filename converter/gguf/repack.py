"""Repacking of tiles to the block types that hold the same weights.

docs/format.md, "Tiles", has the layout of tiles; ggml's `block_q2_K` and `block_q4_K` that of the
results. Permutations move 4 bytes at a time: a code vector, or the scales of one row and chunk.
"""

import torch
from torch import Tensor

from formats.packing import BLOCK_COLUMNS, HALF_ROWS, HEAD_BYTES, TILE_ROWS, blocks_of
from formats.tiles import QuantizedMatrix

_Q2_CODES = 512
_Q3_CODES = 1536
"""Bytes of the codes of one chunk; the chunk's scales follow."""

Q2_K_BYTES = 84
Q4_K_BYTES = 144
Q4_1_BYTES = 20
Q4_1_COLUMNS = 32


def q2_k_rows(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Repack tiles of tile32-q2-g16-s4 to Q2_K: uint8 [rows, blocks · 84].

    tiles: uint8 [tiles, tile bytes]; columns is a multiple of 256. Both layouts have S and M as
    nibbles of one byte per group, so these bytes only move.
    """
    chunks = _chunks(tiles, columns, 4)
    # tile, block, chunk, vector, half, row -> tile, half, row, block, chunk, vector
    codes = chunks[..., :_Q2_CODES].view(torch.int32).unflatten(-1, (4, 2, HALF_ROWS))
    codes = codes.permute(0, 4, 5, 1, 2, 3).contiguous().view(torch.uint8)
    # A chunk's byte has codes of 4 groups of 16. A byte of Q2_K has 4 columns of 128, 32 apart.
    pairs = codes.view(-1, blocks_of(columns), 2, 2, 16)
    a = pairs[..., 0, :]
    b = pairs[..., 1, :]
    even = (a & 3) | ((a >> 2) & 0x0C) | ((b << 4) & 0x30) | ((b << 2) & 0xC0)
    odd = ((a >> 2) & 3) | ((a >> 4) & 0x0C) | ((b << 2) & 0x30) | (b & 0xC0)
    result = torch.empty(len(pairs), blocks_of(columns), Q2_K_BYTES, dtype=torch.uint8)
    result[..., :16] = _scale_bytes(chunks[..., _Q2_CODES:])
    result[..., 16:80].view(*result.shape[:2], 2, 2, 16)[:] = torch.stack([even, odd], dim=-2)
    result[..., 80:] = _row_scales(tiles)
    return result[:rows].flatten(1)


def q4_k_rows(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Repack tiles of tile32-q3-g32-s4 to Q4_K: uint8 [rows, blocks · 144].

    tiles, columns: as in `q2_k_rows`. 3-bit codes fit 4 bits, 4-bit S and M fit 6 bits.
    """
    chunks = _chunks(tiles, columns, 2)
    # tile, block, chunk, pair, half, 3, row -> 3, tile, half, row, block, chunk, pair
    codes = chunks[..., :_Q3_CODES].view(torch.int32).unflatten(-1, (4, 2, 3, HALF_ROWS))
    codes = codes.permute(5, 0, 4, 6, 1, 2, 3).contiguous().view(torch.uint8)
    codes = codes.view(3, -1, blocks_of(columns), 2, 4, 4)
    low = codes[:2]
    high = codes[2]
    result = torch.empty(low.shape[1], blocks_of(columns), Q4_K_BYTES, dtype=torch.uint8)
    result[..., :4] = _row_scales(tiles)
    sm = _scale_bytes(chunks[..., _Q3_CODES:])
    result[..., 4:8] = sm[..., :4] & 15
    result[..., 8:12] = sm[..., :4] >> 4
    result[..., 12:16] = sm[..., 4:]
    # Axes of a row's codes: block, chunk, pair of planes, pair of vectors, vector, byte.
    nibbles = result[..., 16:].view(*result.shape[:2], 2, 2, 4, 2, 4)
    for first in (0, 2):
        for odd in (0, 1):
            planes = [_q3_codes(low[odd], high, plane, odd) for plane in (first, first + 1)]
            nibbles[:, :, :, first // 2, :, odd] = planes[0] | (planes[1] << 4)
    return result[:rows].flatten(1)


def q4_1_rows(matrix: QuantizedMatrix, group_size: int) -> Tensor:
    """Return codes with scales rounded to float16 as Q4_1: uint8 [rows, columns / 32 · 20].

    group_size: a multiple of 32. Codes stay; `ds·S` and `−dm·M` become one float16 each.
    """
    rows, columns = matrix.codes.shape
    scale = matrix.ds.float()[:, None] * matrix.s
    minimum = -(matrix.dm.float()[:, None] * matrix.m)
    repeats = group_size // Q4_1_COLUMNS
    halves = torch.stack([scale, minimum], dim=2).half().repeat_interleave(repeats, dim=1)
    blocks = columns // Q4_1_COLUMNS
    codes = matrix.codes.reshape(rows, blocks, 2, Q4_1_COLUMNS // 2)
    result = torch.empty(rows, blocks, Q4_1_BYTES, dtype=torch.uint8)
    result[..., :4] = halves[:, :blocks].contiguous().view(torch.uint8)
    result[..., 4:] = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return result.flatten(1)


def _chunks(tiles: Tensor, columns: int, chunks: int) -> Tensor:
    """View the tiles' bodies as chunks: uint8 [tiles, blocks, chunks, chunk bytes]."""
    if columns % BLOCK_COLUMNS:
        raise ValueError(f"{columns} columns, expected a multiple of {BLOCK_COLUMNS}")
    return tiles.contiguous()[:, HEAD_BYTES:].view(len(tiles), blocks_of(columns), chunks, -1)


def _scale_bytes(scales: Tensor) -> Tensor:
    """Return S and M of each row in the groups' order: uint8 [all rows, blocks, groups].

    scales: uint8 [tiles, blocks, chunks, 128]; a byte is S | M << 4.
    """
    # tile, block, chunk, half, row -> tile, half, row, block, chunk
    words = scales.view(torch.int32).unflatten(-1, (2, HALF_ROWS)).permute(0, 3, 4, 1, 2)
    groups: Tensor = words.contiguous().view(torch.uint8)
    return groups.view(-1, *groups.shape[3:])


def _row_scales(tiles: Tensor) -> Tensor:
    """Return ds and dm of each row as bytes: uint8 [all rows, 1, 4]."""
    head = tiles[:, :HEAD_BYTES].reshape(len(tiles), 2, 2, HALF_ROWS, 2)
    return head.transpose(2, 3).reshape(len(tiles) * TILE_ROWS, 1, 4)


def _q3_codes(low: Tensor, high: Tensor, plane: int, odd: int) -> Tensor:
    """Return the 3-bit codes of a plane for the first or second vector of each pair."""
    # The top bit's position is that of formats/tile_bits.py.
    bit = 2 * plane + 2 + odd if plane < 3 else odd
    top = (high << (2 - bit)) if bit < 2 else (high >> (bit - 2))
    return ((low >> (2 * plane)) & 3) | (top & 4)
