"""The native header states the same constants as formats/packing.py."""

import re
from pathlib import Path

from formats.packing import BLOCK_COLUMNS, HALF_ROWS, HEAD_BYTES, PACKINGS, TILE_ROWS

TEXT = (Path(__file__).parent.parent / "formats/native/tile_layout.h").read_text()


def constants(pattern: str) -> list[tuple[str, ...]]:
    return [m.groups() for m in re.finditer(pattern, TEXT)]


def test_tile_constants_are_those_of_the_reference() -> None:
    found = constants(r"inline constexpr int (\w+) = (\d+);")
    expected = {
        "kTileRows": TILE_ROWS,
        "kBlockCols": BLOCK_COLUMNS,
        "kHeadBytes": HEAD_BYTES,
        "kHalfRows": HALF_ROWS,
        "kPackings": len(PACKINGS),
    }
    assert {name: int(value) for name, value in found} == expected


def test_packing_table_is_that_of_the_reference() -> None:
    found = constants(r'\{"([^"]+)", (\d+), (\d+), (\d+), (\d+)\}')
    expected = [(p.name, p.nbits, p.group_size, p.scale_bits, p.block_bytes) for p in PACKINGS.values()]
    assert [(name, *map(int, numbers)) for name, *numbers in found] == expected


def test_packing_ids_are_the_positions_in_the_table() -> None:
    found = constants(r"k(Q\w+) = (\d+),\s*// (\S+)")
    assert [(int(number), name) for _, number, name in found] == list(enumerate(PACKINGS))
    assert [label for label, _, _ in found] == [name[len("tile32-") :].replace("-", "").upper() for name in PACKINGS]
