"""Encoding of a stored matrix as rows of a type: repacked if that is exact, else from weights."""

from collections.abc import Iterator

import torch
from gguf.quants import quantize
from torch import Tensor

from converter.gguf import requantize
from converter.gguf.block_types import Type
from converter.gguf.repack import q2_k_rows, q4_1_rows, q4_k_rows
from formats.errors import FormatError
from formats.packing import TILE_ROWS, AnyPacking, Packing, tiles_of
from formats.tiles import matrix_weights, unpack

CHUNK_WEIGHTS = 1 << 20
"""Weights that are encoded at once: their temporaries stay in the processor's cache."""


def encoded_chunks(
    packing: AnyPacking, stored: Tensor, rows: int, columns: int, kind: Type, where: str
) -> Iterator[Tensor]:
    """Yield the rows of a stored matrix as `kind`, some at a time: uint8 [n, row bytes].

    stored: the packing's dtype and `stored_shape`. where: the matrix, for the message. Raises
    FormatError if a weight is too large for float16.
    """
    step = max(TILE_ROWS, CHUNK_WEIGHTS // columns // TILE_ROWS * TILE_ROWS)
    for begin in range(0, rows, step):
        n_rows = min(step, rows - begin)
        if isinstance(packing, Packing):
            first = begin // TILE_ROWS
            part = stored[first : first + tiles_of(n_rows)]
            yield _encoded_tiles(packing, part, n_rows, columns, kind, where)
        else:
            yield encoded_floats(stored[begin : begin + n_rows], kind, where)


def encoded_floats(weights: Tensor, kind: Type, where: str) -> Tensor:
    """Return float weights [rows, columns] as `kind`: uint8 [rows, row bytes].

    Raises FormatError if a weight is too large for float16.
    """
    if kind in _FLOATS:
        result = weights.to(_FLOATS[kind])
        if (
            kind == Type.F16
            and weights.dtype != torch.float16
            and not bool(result.isfinite().all())
        ):
            largest = float(weights.abs().max())
            raise FormatError(
                f"{where}: a weight of size {largest:g} is too large for float16",
                "export with --experts f32 --attention f32",
            )
        return result.contiguous().view(torch.uint8)
    if kind == Type.Q8_0:
        return torch.from_numpy(quantize(weights.float().numpy(), kind))
    step = max(1, requantize.CHUNK_WEIGHTS // weights.shape[1])
    return torch.cat([_BLOCKS[kind](part.float()) for part in weights.split(step)])


def _encoded_tiles(
    packing: Packing, tiles: Tensor, rows: int, columns: int, kind: Type, where: str
) -> Tensor:
    if packing.name == "tile32-q2-g16-s4" and kind == Type.Q2_K:
        return q2_k_rows(tiles, rows, columns)
    if packing.name == "tile32-q3-g32-s4" and kind == Type.Q4_K:
        return q4_k_rows(tiles, rows, columns)
    if kind == Type.Q4_1 and packing.group_size % 32 == 0:
        return q4_1_rows(unpack(tiles, packing, rows, columns), packing.group_size)
    return encoded_floats(matrix_weights(packing, tiles, rows, columns), kind, where)


_FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_BLOCKS = {
    Type.Q4_1: requantize.q4_1_blocks,
    Type.Q4_K: requantize.q4_k_blocks,
    Type.Q3_K: requantize.q3_k_blocks,
}
