"""Native headers have the constants of formats/packing.py and formats/native/abi.py, each once."""

import re

import pytest
import torch
from project_paths import ROOT

from formats.native.abi import DTYPES, ISAS, Status
from formats.packing import BLOCK_COLUMNS, HEAD_BYTES, PACKINGS, TILE_ROWS
from formats.tile_bits import HALF_ROWS

SHARED = ROOT / "formats/native"
NATIVE_FOLDERS = (
    SHARED,
    ROOT / "loader/native",
    ROOT / "converter/native",
    ROOT / "loader/cuda/kernels",
)
SOURCES = sorted(
    path
    for folder in NATIVE_FOLDERS
    for path in folder.rglob("*.*")
    if "__pycache__" not in path.parts
)


def matches(name: str, pattern: str) -> list[tuple[str, ...]]:
    return [m.groups() for m in re.finditer(pattern, (SHARED / name).read_text())]


def numbers(name: str, pattern: str) -> dict[str, int]:
    return {key: int(value) for key, value in matches(name, pattern)}


def label(packing: str) -> str:
    """Return a packing's name in native code: tile32-q2-g16-s4 is Q2G16S4."""
    return packing.removeprefix("tile32-").replace("-", "").upper()


def test_tile_constants_are_those_of_the_reference() -> None:
    assert numbers("tile_layout.h", r"inline constexpr int (\w+) = (\d+);") == {
        "kTileRows": TILE_ROWS,
        "kBlockCols": BLOCK_COLUMNS,
        "kHeadBytes": HEAD_BYTES,
        "kHalfRows": HALF_ROWS,
    }


def test_list_of_packings_is_that_of_the_reference() -> None:
    listed = matches("packings.h", r'X\(k(\w+), (\w+), "([^"]+)", (\d+), (\d+), (\d+), (\d+)\)')
    assert [(name, *map(int, rest)) for _, _, name, *rest in listed] == [
        (p.name, p.nbits, p.group_size, p.scale_bits, p.chunks) for p in PACKINGS.values()
    ]
    assert [one[:2] for one in listed] == [
        (label(name), name.removeprefix("tile32-").replace("-", "_")) for name in PACKINGS
    ]


def test_statuses_isas_and_dtypes_are_those_of_the_header() -> None:
    stated = numbers("abi.h", r"MOE_(?:E_)?(\w+) = (-?\d+)")
    assert {name: stated.pop(name) for name in Status.__members__} == {
        status.name: status for status in Status
    }
    assert {
        f"ISA_{name.upper()}": number for name, number in ISAS.items()
    }.items() <= stated.items()
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    assert {names[name]: stated[name] for name in names} == DTYPES


@pytest.mark.parametrize("name", PACKINGS)
def test_no_other_file_lists_the_packings(name: str) -> None:
    # The file of a packing names it and those of equal bits and group size; a list names all.
    others = [label(other) for other in PACKINGS if other[:14] != name[:14]]
    files = [
        path
        for path in SOURCES
        if path.name not in ("packings.h", "test_kernels.cpp", "test_solver.cpp")
    ]
    texts = {path: path.read_text() for path in files}
    lists = [
        path
        for path, text in texts.items()
        if label(name) in text and any(other in text for other in others)
    ]
    assert lists == []


@pytest.mark.parametrize(
    "definition",
    [
        r"half_to_float\(uint16_t",
        r"__builtin_cpu_supports\(\"avx2\"",
        r"MOE_OK = 0",
        r"MOE_ISA_AVX2 = 1",
        r"define MOE_API",
    ],
)
def test_what_both_libraries_need_is_stated_once(definition: str) -> None:
    on_the_cpu = [path for path in SOURCES if path.suffix != ".cuh"]
    holders = {path.parent for path in on_the_cpu if re.search(definition, path.read_text())}
    assert holders == {SHARED}
