"""Written headers are valid for the safetensors package, and their data is aligned to 4096."""

import os
from pathlib import Path

import pytest
import torch
from make_vectors import write_folder
from safetensors import safe_open
from safetensors.torch import save_file

from formats.config.strict_json import parse
from formats.errors import SourceError
from formats.safetensors_header import TensorEntry, build_header, read_header

FILES = ["experts/layer-000.safetensors", "trunk.safetensors"]


def header_of(path: Path) -> tuple[dict[str, TensorEntry], int]:
    with open(path, "rb") as f:
        header = read_header(f.fileno(), str(path))
    return header.entries, header.data_offset


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("name", FILES)
def test_file_is_taken_by_the_safetensors_package(tmp_path: Path, name: str, codec: str) -> None:
    path = write_folder(tmp_path / "folder", codec=codec) / name
    entries, _ = header_of(path)
    with safe_open(path, "pt") as f:
        assert set(f.keys()) == set(entries)
        for key, entry in entries.items():
            assert tuple(f.get_slice(key).get_shape()) == entry.shape
            assert f.get_slice(key).get_dtype() == entry.dtype
        assert f.metadata()["format"] == "moe-convert"


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("name", FILES)
def test_data_begins_at_a_multiple_of_4096(tmp_path: Path, name: str, codec: str) -> None:
    _, data_offset = header_of(write_folder(tmp_path / "folder", codec=codec) / name)
    assert data_offset > 0
    assert data_offset % 4096 == 0


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_every_expert_begins_at_a_multiple_of_4096(tmp_path: Path, codec: str) -> None:
    packings = ("tile32-q2-g16-s8", "tile32-q3-g32-s4")
    entries, data_offset = header_of(
        write_folder(tmp_path / "folder", packings=packings, codec=codec) / FILES[0]
    )
    begins = [e.begin for e in entries.values() if e.name.endswith((".gate_up", ".zstd"))]
    assert len(begins) == 2
    assert all((data_offset + begin) % 4096 == 0 for begin in begins)


@pytest.mark.parametrize("extra", range(0, 4200, 350))
def test_header_of_any_length_is_padded_to_4096(tmp_path: Path, extra: int) -> None:
    header = build_header([TensorEntry("a", "U8", (4,), 0, 4)], {"note": "é" * extra})
    (tmp_path / "f.safetensors").write_bytes(header + b"abcd")
    assert len(header) % 4096 == 0
    assert header_of(tmp_path / "f.safetensors")[1] == len(header)
    with safe_open(tmp_path / "f.safetensors", "pt") as f:
        assert bytes(f.get_tensor("a")) == b"abcd"
        assert f.metadata() == {"note": "é" * extra}


def test_header_of_the_safetensors_package_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(0, 7, dtype=torch.bfloat16),
        "c": torch.tensor(1),
    }
    save_file(tensors, tmp_path / "f.safetensors")
    entries, _ = header_of(tmp_path / "f.safetensors")
    assert {(e.name, e.dtype, e.shape) for e in entries.values()} == {
        ("a", "F32", (3, 5)),
        ("b", "BF16", (0, 7)),
        ("c", "I64", ()),
    }


def test_header_length_beyond_the_file_allocates_nothing_and_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes((99_000_000).to_bytes(8, "little") + b"{}")
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(
        Exception, match="cut off inside its header: 10 bytes, the header ends at 99000008"
    ):
        read_header(descriptor, str(path))
    os.close(descriptor)


def test_json_error_has_the_type_that_the_caller_asks_for() -> None:
    with pytest.raises(SourceError, match="weight map: key 'a' stands twice"):
        parse(b'{"a": 1, "a": 2}', "weight map", error=SourceError)
