"""The packings: names and sizes. `tiles.py` packs and unpacks (docs/format.md, "Tiles").

Nothing here imports torch at import time: light commands such as `inspect` read sizes only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.errors import FormatError

if TYPE_CHECKING:
    import torch

HALF_ROWS = 16
"""Rows of one half of a tile."""
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
    rows_each = TILE_ROWS
    """Rows of the matrix in one row of the stored tensor."""

    @property
    def torch_dtype(self) -> "torch.dtype":
        """Dtype of the stored tensor: uint8."""
        import torch

        return torch.uint8

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


@dataclass(frozen=True)
class PlainPacking:
    """A matrix as [rows, columns] of a 16-bit float (docs/format.md, "Rows").

    Rows have no padding, head or scales. Methods and attributes have the names of their
    counterparts in `Packing`.
    """

    name: str
    dtype: str
    """Dtype of the tensor in the file, in safetensors' notation."""

    nbits = 16
    rows_each = 1
    """Rows of the matrix in one row of the stored tensor."""

    @property
    def torch_dtype(self) -> "torch.dtype":
        """Dtype of the stored tensor: bfloat16 or float16."""
        import torch

        return torch.bfloat16 if self.dtype == "BF16" else torch.float16

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the stored [rows, columns] matrix: the same."""
        return rows, columns

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Return the size of a [rows, columns] matrix in bytes."""
        return 2 * rows * columns


PLAIN_PACKINGS: dict[str, PlainPacking] = {
    packing.name: packing
    for packing in (PlainPacking("rows-bf16", "BF16"), PlainPacking("rows-f16", "F16"))
}

AnyPacking = Packing | PlainPacking
ALL_PACKINGS: dict[str, AnyPacking] = {**PACKINGS, **PLAIN_PACKINGS}
"""Packings of experts. Packed matrices of the trunk are always tiles (`PACKINGS`)."""


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
