"""tests/vectors against the writer, the reader and the examples of docs/format.md."""

import filecmp
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture_of
from bad_folders import VECTORS
from make_vectors import CONFIG, expert_blob, quantized, write_folder, write_vectors
from project_paths import ROOT

from formats.artifact import Artifact
from formats.errors import MoeConvertError
from formats.expert import ExpertLayout
from formats.packing import ALL_PACKINGS, PACKINGS
from formats.reading.readers import READERS
from formats.reading.verify import verify_folder
from formats.safetensors_header import read_header
from formats.tiles import dequantize, pack, unpack

TILES = [*PACKINGS, "example"]
BAD_HEADERS: dict[str, dict[str, str]] = json.loads(
    (VECTORS / "bad-headers/manifest.json").read_text()
)
PAGE = (ROOT / "docs/format.md").read_text()


def tile(name: str) -> tuple[dict[str, Any], bytes]:
    case = json.loads((VECTORS / f"tiles/{name}.json").read_text())
    case["codes"] = [[int(c, 16) for c in row] for row in case["codes"]]
    return case, (VECTORS / f"tiles/{name}.bin").read_bytes()


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", TILES)
def test_packing_gives_the_bytes_of_the_vector(name: str) -> None:
    case, packed = tile(name)
    assert pack(quantized(case), PACKINGS[case["packing"]]).numpy().tobytes() == packed


@pytest.mark.parametrize("name", TILES)
def test_unpacking_gives_the_numbers_of_the_vector(name: str) -> None:
    case, packed = tile(name)
    tiles = torch.frombuffer(bytearray(packed), dtype=torch.uint8)[None]
    matrix = unpack(tiles, PACKINGS[case["packing"]], case["rows"], case["columns"])
    for field in ("codes", "s", "m", "ds", "dm"):
        assert getattr(matrix, field).tolist() == case[field]


@pytest.mark.parametrize("name", TILES)
def test_weights_have_the_sha256_of_the_vector(name: str) -> None:
    case, _ = tile(name)
    weights = dequantize(quantized(case), PACKINGS[case["packing"]].group_size).contiguous()
    assert (
        hashlib.sha256(weights.numpy().tobytes()).hexdigest()
        == case["sha256_of_weights_as_float32"]
    )


def test_writer_reproduces_the_folder_byte_for_byte(tmp_path: Path) -> None:
    written = write_folder(tmp_path / "folder")
    names = files_of(VECTORS / "folder")
    assert files_of(written) == names
    assert filecmp.cmpfiles(VECTORS / "folder", written, names, shallow=False) == (names, [], [])


def test_generator_reproduces_every_vector(tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors")
    for part in ("tiles", "folder", "folder-rows", "bad-headers"):
        names = files_of(VECTORS / part)
        assert files_of(tmp_path / "vectors" / part) == names
        same, different, missing = filecmp.cmpfiles(
            VECTORS / part, tmp_path / "vectors" / part, names, shallow=False
        )
        assert (len(same), different, missing) == (len(names), [], [])


@pytest.mark.parametrize("folder", ["folder", "folder-rows"])
def test_good_folder_verifies(folder: str) -> None:
    report = verify_folder(VECTORS / folder, read_data=True)
    assert report.problems == []
    assert (report.experts, report.files) == (2, 4)


@pytest.mark.parametrize("io", READERS)
@pytest.mark.parametrize(
    ("folder", "packings"),
    [
        ("folder", ("tile32-q2-g16-s4", "tile32-q2-g16-s4")),
        ("folder-rows", ("rows-bf16", "rows-f16")),
    ],
)
def test_good_folder_reads(folder: str, packings: tuple[str, str], io: str) -> None:
    artifact = Artifact.open(VECTORS / folder)
    layout = ExpertLayout.from_names(architecture_of(CONFIG), *packings)
    with READERS[io](artifact) as reader:
        for expert in (0, 1):
            assert torch.equal(reader.read(0, expert), expert_blob(layout, expert))


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_safetensors_header_is_refused(name: str) -> None:
    path = VECTORS / f"bad-headers/{name}.safetensors"
    with open(path, "rb") as f, pytest.raises(MoeConvertError) as caught:
        read_header(f.fileno(), str(path))
    assert type(caught.value).__name__ == BAD_HEADERS[name]["error"]
    assert caught.value.message.startswith(str(path))
    assert BAD_HEADERS[name]["message"] in caught.value.message
    assert caught.value.hint


def test_vectors_stay_small() -> None:
    assert sum(os.path.getsize(VECTORS / name) for name in files_of(VECTORS)) < 300_000


def test_hex_of_the_format_page_is_the_example_vector() -> None:
    case = json.loads((VECTORS / "tiles/example.json").read_text())
    _, packed = tile("example")
    dump = re.search(r"```hex\n(.*?)```", PAGE, re.DOTALL)
    assert dump
    assert parse_hex(dump[1]) == packed
    numbers = re.search(r"```json example\n(.*?)```", PAGE, re.DOTALL)
    assert numbers
    assert json.loads(numbers[1]) == {k: v for k, v in case.items() if not k.startswith("sha256")}


def test_header_of_the_format_page_is_that_of_the_good_folder() -> None:
    shown = re.search(r"```json header\n(.*?)```", PAGE, re.DOTALL)
    assert shown
    with open(VECTORS / "folder/experts/layer-000.safetensors", "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        assert json.loads(f.read(length)) == json.loads(shown[1])


def test_every_field_of_the_index_stands_in_the_format_page() -> None:
    index = json.loads((VECTORS / "folder/moe_index.json").read_text())
    parts = (
        index,
        index["layers"][0],
        index["layers"][0]["experts"][0],
        index["trunk"],
        index["producer"],
    )
    fields = {
        name
        for part in (*parts, index["recipe"], index["source"], index["files"][0])
        for name in part
    }
    assert [
        field for field in sorted(fields) if f"`{field}`" not in PAGE and f".{field}`" not in PAGE
    ] == []


def test_every_packing_stands_in_the_format_page() -> None:
    assert [name for name in ALL_PACKINGS if f"`{name}`" not in PAGE] == []
    for packing in PACKINGS.values():
        assert str(packing.block_bytes) in PAGE


def parse_hex(text: str) -> bytes:
    """Parse a dump of lines `offset: 16 bytes`. A line `*` repeats the one before up to the next
    offset.
    """
    data = b""
    for line in text.splitlines():
        if line == "*":
            continue
        offset, _, numbers = line.partition(":")
        while len(data) < int(offset, 16):
            data += data[-16:]
        data += bytes.fromhex(numbers.partition("|")[0])
    return data
