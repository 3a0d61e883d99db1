"""A second packer, byte by byte from the text of docs/format.md ("Packings"), without code from
formats.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

Table = list[list[int]]

GROUP_SIZES = {
    "tile32-q2-g16-s4": 16,
    "tile32-q2-g16-s8": 16,
    "tile32-q3-g32-s4": 32,
    "tile32-q3-g64-s8": 64,
    "tile32-q4-g64-s8": 64,
}


class Ranges(NamedTuple):
    """The largest code, the largest S, the smallest and the largest M of a packing."""

    code: int
    s: int
    m_low: int
    m_high: int


def ranges(packing: str) -> Ranges:
    """Return the ranges of the integers of `packing`, from its name."""
    code = 2 ** int(packing[len("tile32-q")]) - 1
    return Ranges(code, 15, 0, 15) if packing.endswith("s4") else Ranges(code, 255, -127, 127)


@dataclass
class Block:
    """32 rows × 256 columns: codes[row][column], s and m [row][group]."""

    codes: Table
    s: Table
    m: Table

    def low(self, half: int, first: int, step: int) -> bytes:
        """A code vector of the low two bits; plane v begins at column `first + step·v`."""
        return self._vector(
            half,
            lambda row, c: sum(
                (self.codes[row][first + step * v + c] & 3) << 2 * v for v in range(4)
            ),
        )

    def nibbles(self, half: int, first: int) -> bytes:
        """A code vector of two nibble planes; plane v begins at column `first + 64·v`."""
        return self._vector(
            half, lambda row, c: sum(self.codes[row][first + 64 * v + c] << 4 * v for v in (0, 1))
        )

    def high(self, half: int, first: int, step: int) -> bytes:
        """The 64 bytes of top bits of a pair of vectors; plane v of vector o begins at `first + 4·o
        + step·v`.
        """

        def bits(row: int, c: int) -> int:
            byte = 0
            for o in (0, 1):
                for v in range(4):
                    top = self.codes[row][first + 4 * o + step * v + c] >> 2
                    byte |= top << (2 * v + 2 + o if v < 3 else o)
            return byte

        return self._vector(half, bits)

    def scale_nibbles(self, half: int, first: int) -> bytes:
        """S and M of groups first..first+3 as nibbles, byte 4·row + v."""
        return self._vector(
            half, lambda row, v: self.s[row][first + v] | self.m[row][first + v] << 4
        )

    def scales_by_row(self, half: int, table: Table, first: int) -> bytes:
        """64 bytes, byte 4·row + v."""
        return self._vector(half, lambda row, v: table[row][first + v] & 255)

    def scales_by_group(self, half: int, table: Table, groups: tuple[int, ...]) -> bytes:
        """16 bytes a group."""
        return bytes(table[row][g] & 255 for g in groups for row in self._rows(half))

    @staticmethod
    def _rows(half: int) -> range:
        return range(16 * half, 16 * half + 16)

    def _vector(self, half: int, byte: Callable[[int, int], int]) -> bytes:
        return bytes(byte(row, c) for row in self._rows(half) for c in range(4))


def superblock(packing: str, b: Block) -> Iterator[bytes]:
    """The pieces of a superblock, in file order."""
    r01 = (0, 1)
    match packing:
        case "tile32-q2-g16-s4" | "tile32-q2-g16-s8":
            for q in range(4):
                for j in range(4):
                    for r in r01:
                        yield b.low(r, 64 * q + 4 * j, 16)
                for r in r01:
                    if packing.endswith("s4"):
                        yield b.scale_nibbles(r, 4 * q)
                    else:
                        yield b.scales_by_row(r, b.s, 4 * q) + b.scales_by_row(r, b.m, 4 * q)
        case "tile32-q3-g32-s4":
            for q in (0, 1):
                for i in range(4):
                    for r in r01:
                        for j in (2 * i, 2 * i + 1):
                            yield b.low(r, 128 * q + 4 * j, 32)
                        yield b.high(r, 128 * q + 8 * i, 32)
                for r in r01:
                    yield b.scale_nibbles(r, 4 * q)
        case "tile32-q3-g64-s8":
            for i in range(8):
                for r in r01:
                    for j in (2 * i, 2 * i + 1):
                        yield b.low(r, 4 * j, 64)
                    yield b.high(r, 8 * i, 64)
            for r in r01:
                yield b.scales_by_group(r, b.s, (0, 1, 2, 3)) + b.scales_by_group(
                    r, b.m, (0, 1, 2, 3)
                )
        case "tile32-q4-g64-s8":
            for h in (0, 1):
                for j in range(16):
                    for r in r01:
                        yield b.nibbles(r, 128 * h + 4 * j)
                for r in r01:
                    groups = (2 * h, 2 * h + 1)
                    yield b.scales_by_group(r, b.s, groups) + b.scales_by_group(r, b.m, groups)


def brute_pack(
    packing: str, codes: Table, s: Table, m: Table, ds: list[float], dm: list[float]
) -> bytes:
    """All tiles of a matrix: codes [rows][columns], s and m [rows][groups], ds and dm [rows]."""
    rows, columns, per_block = len(codes), len(codes[0]), 256 // GROUP_SIZES[packing]
    result = b""
    for tile in range(0, rows, 32):
        for half in (tile, tile + 16):
            for scales in (ds, dm):
                padded = scales[half : half + 16] + [0.0] * max(0, half + 16 - max(rows, half))
                result += struct.pack("<16e", *padded)
        for k in range(-(-columns // 256)):
            block = Block(
                _cut(codes, tile, 256 * k, 256),
                _cut(s, tile, per_block * k, per_block),
                _cut(m, tile, per_block * k, per_block),
            )
            result += b"".join(superblock(packing, block))
    return result


def _cut(table: Table, row: int, column: int, width: int) -> Table:
    """32 rows × `width` columns of `table` from (row, column), zeros outside."""
    rows = [line[column : column + width] for line in table[row : row + 32]]
    rows = [line + [0] * (width - len(line)) for line in rows]
    return rows + [[0] * width for _ in range(32 - len(rows))]
