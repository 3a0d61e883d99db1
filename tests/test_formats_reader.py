"""Readers: the suite that every implementation inherits, and what is particular to one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import zstandard
from bad_folders import copy_of_good
from make_vectors import CONFIG, expert_blob, write_folder

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reader import ExpertReader, MmapReader, PreadReader

LAYER = "experts/layer-000.safetensors"


class ReaderSuite:
    """What holds for every reader."""

    kind: type[ExpertReader]

    @pytest.mark.parametrize("codec", ["none", "zstd"])
    def test_every_expert_has_the_bytes_that_were_written(self, tmp_path: Path, codec: str) -> None:
        packings = ("tile32-q2-g16-s8", "tile32-q3-g32-s4")
        config = {**CONFIG, "num_hidden_layers": 2, "num_local_experts": 3}
        artifact = Artifact.open(write_folder(tmp_path / "f", packings=packings, codec=codec, config=config))
        with self.kind(artifact) as reader:
            for layer in (0, 1):
                for expert in (0, 1, 2):
                    blob = reader.read(layer, expert)
                    assert blob.dtype == torch.uint8
                    assert torch.equal(blob, expert_blob(artifact.layout(layer, expert), 100 * layer + expert))

    def test_several_threads_read_at_once(self, tmp_path: Path) -> None:
        artifact = Artifact.open(write_folder(tmp_path / "f", codec="zstd"))
        expected = [expert_blob(artifact.layout(0, expert), expert) for expert in (0, 1)]
        with self.kind(artifact) as reader, ThreadPoolExecutor(4) as pool:
            for number, blob in enumerate(pool.map(lambda expert: reader.read(0, expert), [0, 1] * 20)):
                assert torch.equal(blob, expected[number % 2])

    def test_writing_into_what_was_read_does_not_reach_the_file(self, tmp_path: Path) -> None:
        folder = copy_of_good(tmp_path)
        before = (folder / LAYER).read_bytes()
        with self.kind(Artifact.open(folder)) as reader:
            reader.read(0, 1).fill_(7)
        assert (folder / LAYER).read_bytes() == before

    def test_tensor_outlives_its_reader(self, tmp_path: Path) -> None:
        artifact = Artifact.open(copy_of_good(tmp_path))
        with self.kind(artifact) as reader:
            blob = reader.read(0, 1)
        assert torch.equal(blob, expert_blob(artifact.layout(0, 1), 1))

    def test_frame_that_declares_another_size_is_refused_before_it_is_decoded(self, tmp_path: Path) -> None:
        artifact = with_frame(tmp_path, zstandard.ZstdCompressor().compress(bytes(10**6)))
        with (
            self.kind(artifact) as reader,
            pytest.raises(DamageError, match=r"zstd frame of 1000000 bytes, .* takes 8064"),
        ):
            reader.read(0, 1)

    def test_frame_that_declares_no_size_is_refused(self, tmp_path: Path) -> None:
        compressor = zstandard.ZstdCompressor(write_content_size=False)
        artifact = with_frame(tmp_path, compressor.compress(bytes(8064)))
        with self.kind(artifact) as reader, pytest.raises(DamageError, match="layer 0 expert 1 at offset"):
            reader.read(0, 1)

    def test_bytes_behind_a_frame_are_refused(self, tmp_path: Path) -> None:
        artifact = with_frame(tmp_path, zstandard.ZstdCompressor().compress(bytes(8064)) + b"\0")
        with self.kind(artifact) as reader, pytest.raises(DamageError, match="broken zstd frame"):
            reader.read(0, 1)

    def test_flipped_byte_in_a_frame_is_named(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "f", codec="zstd")
        artifact = Artifact.open(folder)
        entry = artifact.entry(0, 1)
        flip(folder / LAYER, entry.offset + entry.length - 1)
        place = f"{LAYER}: layer 0 expert 1 at offset {entry.offset}: broken zstd frame"
        with self.kind(artifact) as reader, pytest.raises(DamageError, match=place):
            reader.read(0, 1)

    def test_file_that_is_not_a_frame_is_named(self, tmp_path: Path) -> None:
        artifact = with_frame(tmp_path, b"not a frame")
        with self.kind(artifact) as reader, pytest.raises(DamageError, match="broken zstd frame"):
            reader.read(0, 1)


class TestMmapReader(ReaderSuite):
    """Reads over maps."""

    kind = MmapReader

    def test_file_that_changed_its_size_is_not_mapped(self, tmp_path: Path) -> None:
        folder = copy_of_good(tmp_path)
        artifact = Artifact.open(folder)
        cut(folder / LAYER, 16384)
        with pytest.raises(DamageError, match=f"{LAYER}: its size changed"):
            MmapReader(artifact)


class TestPreadReader(ReaderSuite):
    """Reads by calls."""

    kind = PreadReader

    def test_file_cut_while_open_is_reported_with_layer_expert_and_offset(self, tmp_path: Path) -> None:
        folder = copy_of_good(tmp_path)
        with PreadReader(Artifact.open(folder)) as reader:
            cut(folder / LAYER, 16384)
            reader.read(0, 0)
            with pytest.raises(DamageError, match=f"{LAYER}: layer 0 expert 1 at offset 12288: .* after 4096 of 8064"):
                reader.read(0, 1)

    def test_file_cut_before_an_expert_is_reported(self, tmp_path: Path) -> None:
        folder = copy_of_good(tmp_path)
        with PreadReader(Artifact.open(folder)) as reader:
            cut(folder / LAYER, 0)
            with pytest.raises(
                DamageError, match="layer 0 expert 0 at offset 4096: the file ends after 0 of 8064 bytes"
            ):
                reader.read(0, 0)


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as f:
        f.truncate(size)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def with_frame(parent: Path, frame: bytes) -> Artifact:
    """A compressed folder whose expert 1 is `frame`, consistent in every other way."""

    frames = iter([None, frame])
    original = zstandard.ZstdCompressor

    class Compressor:
        """Compresses as zstd does, but the second time into `frame`."""

        def __init__(self, **options: object) -> None:
            self._real = original(level=1)

        def compress(self, data: bytes) -> bytes:
            return next(frames) or self._real.compress(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("formats.writer.zstandard.ZstdCompressor", Compressor)
        return Artifact.open(write_folder(parent / "spoiled", codec="zstd"))
