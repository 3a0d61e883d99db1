"""Damage to complete layers of an unfinished conversion: reported, and converted again."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import (
    convert,
    converted_experts,
    flip,
    hashes,
    interrupted,
)

from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import OutputError
from formats.files.partial_file import partial_path
from formats.index import read_index
from formats.writer import LayerWriter


@pytest.fixture(scope="module", params=["none", "zstd"])
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory, codec: str) -> Path:
    """The undisturbed conversion. Tests only read it."""
    out = tmp_path_factory.mktemp("good") / "out"
    convert(source, out, codec=codec)
    return out


@pytest.fixture(scope="module")
def with_complete_layer(source: Path, tmp_path_factory: pytest.TempPathFactory, codec: str) -> Path:
    """A conversion that stopped after its first layer was complete. Tests only copy it."""
    out = tmp_path_factory.mktemp("complete-layer") / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(source, out, patch, codec=codec)
    return out


def flip_in_layer(out: Path, good: Path, part: str) -> Path:
    """Flips one bit in a part of the first layer's complete file, whose places the index of `good`
    has.
    """
    layer = read_index(good).layers[0]
    positions = {
        "header": 40,
        "first byte of expert 0": layer.experts[0].offset,
        "last byte of expert 2": layer.experts[2].offset + layer.experts[2].length - 1,
        "filler behind expert 1": layer.experts[1].offset + layer.experts[1].length,
        "last byte of the file": layer.size_bytes - 1,
    }
    flip(out / layer.file, positions[part], bit=5)
    return out / layer.file


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("header", "the bytes of its header changed"),
        ("first byte of expert 0", "the bytes of expert 0 changed"),
        ("last byte of expert 2", "the bytes of expert 2 changed"),
        ("filler behind expert 1", "the zero bytes behind expert 1 changed"),
        ("last byte of the file", "the zero bytes behind expert 3 changed"),
    ],
)
def test_flipped_bit_in_a_complete_layer_file_changes_no_byte_of_the_result(
    source: Path,
    good: Path,
    with_complete_layer: Path,
    tmp_path: Path,
    codec: str,
    part: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    damaged = flip_in_layer(out, good, part)
    convert(source, out, codec=codec)
    assert hashes(out) == hashes(good)
    assert f"{damaged}: {said}" in caplog.text


def test_undamaged_complete_layer_file_is_kept_without_a_warning(
    source: Path,
    good: Path,
    with_complete_layer: Path,
    tmp_path: Path,
    codec: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    layer = out / "experts" / "layer-000.safetensors"
    before = layer.stat().st_ino
    convert(source, out, codec=codec)
    assert layer.stat().st_ino == before
    assert hashes(out) == hashes(good)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("codec", ["none"], indirect=True)
def test_of_a_damaged_complete_layer_only_the_damaged_expert_is_converted_again(
    source: Path,
    good: Path,
    with_complete_layer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    flip_in_layer(out, good, "last byte of expert 2")
    again = converted_experts(monkeypatch, lambda: convert(source, out))
    assert [key for key in again if key[0] == 0] == [(0, 2)]
    assert (
        "the bytes of expert 0 2 changed since they were written: converting it again"
        in caplog.text
    )
    assert hashes(out) == hashes(good)


@pytest.mark.parametrize("size_bytes", [5000, 200_000])
@pytest.mark.parametrize("codec", ["none"], indirect=True)
def test_complete_layer_file_of_another_size_is_written_again_with_a_warning(
    source: Path, good: Path, with_complete_layer: Path, tmp_path: Path, size_bytes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = Path(shutil.copytree(with_complete_layer, tmp_path / "out"))
    os.truncate(out / "experts" / "layer-000.safetensors", size_bytes)
    convert(source, out)
    assert hashes(out) == hashes(good)
    assert f"layer-000.safetensors: it has {size_bytes} bytes instead of 102400" in caplog.text


def test_damage_in_a_complete_layer_that_calibration_has_passed_is_mended(
    source: Path, tmp_path: Path
) -> None:
    recipe = make_recipe("2bit", calibrate="random", calibration_tokens=1024)
    first, out = tmp_path / "good", tmp_path / "out"
    convert_checkpoint(source, first, recipe)
    convert_checkpoint(source, out, recipe, ConvertOptions(part=(1, 3)))
    convert_checkpoint(source, out, recipe, ConvertOptions(part=(2, 3)))
    flip_in_layer(out, first, "last byte of expert 2")
    convert_checkpoint(source, out, recipe)
    assert hashes(out) == hashes(first)


def test_changed_bytes_of_an_expert_are_never_compressed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(source, whole, codec="zstd")
    original = LayerWriter.finish_zstd

    def changed(self: LayerWriter, written: list[str]) -> Any:
        flip(partial_path(self.path), self.offsets[1] + 7)
        return original(self, written)

    with monkeypatch.context() as patch:
        patch.setattr(LayerWriter, "finish_zstd", changed)
        with pytest.raises(
            OutputError, match="the bytes of expert 1 changed since they were written"
        ):
            convert(source, out, codec="zstd")
    convert(source, out, codec="zstd")
    assert hashes(out) == hashes(whole)
