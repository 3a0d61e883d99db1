"""Readers: the suite that every implementation inherits, and the tests of single ones."""

import errno
import fcntl
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from bad_folders import copy_of_good
from damaged_files import cut, flip
from make_vectors import CONFIG, expert_blob, write_folder

from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reading.direct_reader import DirectReader
from formats.reading.mmap_reader import MmapReader
from formats.reading.reader import ExpertReader, aligned_bytes

LAYER = "experts/layer-000.safetensors"


class ReaderSuite:
    """Facts that hold for every reader."""

    kind: type[ExpertReader]

    @pytest.mark.parametrize("codec", ["none", "zstd"])
    def test_every_expert_has_the_bytes_that_were_written(self, tmp_path: Path, codec: str) -> None:
        packings = ("tile32-q2-g16-s8", "tile32-q3-g32-s4")
        config = {**CONFIG, "num_hidden_layers": 2, "num_local_experts": 3}
        artifact = Artifact.open(
            write_folder(tmp_path / "f", packings=packings, codec=codec, config=config)
        )
        with self.kind(artifact) as reader:
            for layer in (0, 1):
                for expert in (0, 1, 2):
                    blob = reader.read(layer, expert)
                    assert blob.dtype == torch.uint8
                    assert torch.equal(
                        blob, expert_blob(artifact.layout(layer, expert), 100 * layer + expert)
                    )

    def test_several_threads_read_at_once(self, tmp_path: Path) -> None:
        artifact = Artifact.open(write_folder(tmp_path / "f", codec="zstd"))
        expected = [expert_blob(artifact.layout(0, expert), expert) for expert in (0, 1)]
        with self.kind(artifact) as reader, ThreadPoolExecutor(4) as pool:
            for number, blob in enumerate(
                pool.map(lambda expert: reader.read(0, expert), [0, 1] * 20)
            ):
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

    def test_frame_that_declares_another_size_is_refused_before_it_is_decoded(
        self, tmp_path: Path
    ) -> None:
        artifact = with_frame(tmp_path, zstandard.ZstdCompressor().compress(bytes(10**6)))
        with (
            self.kind(artifact) as reader,
            pytest.raises(DamageError, match=r"zstd frame of 1000000 bytes, .* takes 8064"),
        ):
            reader.read(0, 1)

    def test_frame_that_declares_no_size_is_refused(self, tmp_path: Path) -> None:
        compressor = zstandard.ZstdCompressor(write_content_size=False)
        artifact = with_frame(tmp_path, compressor.compress(bytes(8064)))
        with (
            self.kind(artifact) as reader,
            pytest.raises(DamageError, match="layer 0 expert 1 at offset"),
        ):
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
        with self.kind(artifact, check="none") as reader, pytest.raises(DamageError, match=place):
            reader.read(0, 1)

    def test_file_that_is_not_a_frame_is_named(self, tmp_path: Path) -> None:
        artifact = with_frame(tmp_path, b"not a frame")
        with self.kind(artifact) as reader, pytest.raises(DamageError, match="broken zstd frame"):
            reader.read(0, 1)

    def test_expert_comes_in_pieces_that_can_be_interrupted(self, tmp_path: Path) -> None:
        artifact = Artifact.open(
            write_folder(tmp_path / "f", packings=("tile32-q4-g64-s8", "tile32-q4-g64-s8"))
        )
        layout = artifact.layout(0, 1)
        with self.kind(artifact) as reader:
            buffer = None if reader.in_place(0, 1) else aligned_bytes(layout.n_bytes)
            load = reader.load(0, 1, buffer)
            assert load.step(1) == 4096
            assert load.remaining == layout.n_bytes - 4096
            load.step()
            assert not load.remaining
            assert torch.equal(load.result(), expert_blob(layout, 1))

    def test_refused_read_is_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        artifact = Artifact.open(copy_of_good(tmp_path))
        with self.kind(artifact) as reader:
            failing = iter([OSError(5, "Input/output error"), None])
            fetch = reader.fetch

            def sometimes(*arguments: Any) -> None:
                if error := next(failing):
                    raise error
                fetch(*arguments)

            monkeypatch.setattr(reader, "fetch", sometimes)
            assert torch.equal(reader.read(0, 1), expert_blob(artifact.layout(0, 1), 1))

    @pytest.mark.parametrize(
        ("error", "hint"),
        [(errno.EIO, "check the disk"), (errno.ESTALE, "mount the network file system again")],
    )
    def test_read_that_stays_refused_names_the_expert(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, hint: str
    ) -> None:
        monkeypatch.setattr("formats.reading.reader._PAUSES_S", (0.0, 0.0))
        asked = []

        def never(*arguments: Any) -> None:
            asked.append(arguments)
            raise OSError(error, os.strerror(error))

        with self.kind(Artifact.open(copy_of_good(tmp_path))) as reader:
            monkeypatch.setattr(reader, "fetch", never)
            with pytest.raises(
                DamageError, match="expert 1 at offset 12288: cannot be read: "
            ) as caught:
                reader.read(0, 1)
        assert os.strerror(error) in caught.value.message
        assert hint in caught.value.hint
        assert len(asked) == 3

    @pytest.mark.parametrize(("check", "kind"), [("fast", "xxh3"), ("sha256", "sha256")])
    def test_wrong_bytes_are_found_as_they_are_read(
        self, tmp_path: Path, check: str, kind: str
    ) -> None:
        folder = copy_of_good(tmp_path)
        artifact = Artifact.open(folder)
        flip(folder / LAYER, artifact.entry(0, 1).offset + 100)
        with (
            self.kind(artifact, check="none") as careless,
            self.kind(artifact, check=check) as careful,
        ):
            careless.read(0, 1)
            careful.read(0, 0)
            with pytest.raises(
                DamageError, match=rf"{LAYER}: layer 0 expert 1 .*: the {kind} of its bytes is"
            ) as e:
                careful.read(0, 1)
            assert e.value.hint.startswith(f"moe-convert repair {folder}")

    @pytest.mark.parametrize("check", ["fast", "sha256"])
    def test_bytes_that_turn_wrong_are_found_when_they_are_read_again(
        self, tmp_path: Path, check: str
    ) -> None:
        folder = copy_of_good(tmp_path)
        artifact = Artifact.open(folder)
        with self.kind(artifact, check=check) as reader:
            reader.read(0, 1)
            reader.forget(0, 1)
            flip(folder / LAYER, artifact.entry(0, 1).offset + 100)
            with pytest.raises(DamageError, match="layer 0 expert 1 "):
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

    def test_expert_is_used_where_it_lies(self, tmp_path: Path) -> None:
        with MmapReader(Artifact.open(copy_of_good(tmp_path))) as reader:
            assert reader.read(0, 1).data_ptr() == reader.read(0, 1).data_ptr()

    def test_forgotten_expert_has_its_bytes_again(self, tmp_path: Path) -> None:
        artifact = Artifact.open(copy_of_good(tmp_path))
        with MmapReader(artifact) as reader:
            before = reader.read(0, 1)
            reader.forget(0, 1)
            assert torch.equal(before, expert_blob(artifact.layout(0, 1), 1))


class TestDirectReader(ReaderSuite):
    """Reads by calls."""

    kind = DirectReader

    def test_short_reads_go_on_where_they_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        artifact = Artifact.open(copy_of_good(tmp_path))
        real = os.preadv

        def short(descriptor: int, views: list[memoryview], offset: int) -> int:
            return real(descriptor, [views[0][:4096]], offset)

        monkeypatch.setattr(os, "preadv", short)
        with DirectReader(artifact) as reader:
            assert torch.equal(reader.read(0, 1), expert_blob(artifact.layout(0, 1), 1))

    @pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
    def test_file_system_without_direct_reads_is_read_through_the_cache(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        error: int,
    ) -> None:
        artifact = Artifact.open(copy_of_good(tmp_path))
        real = os.preadv

        def refusing(descriptor: int, views: list[memoryview], offset: int) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(error, os.strerror(error))
            return real(descriptor, views, offset)

        monkeypatch.setattr(os, "preadv", refusing)
        with caplog.at_level(logging.INFO), DirectReader(artifact) as reader:
            assert torch.equal(reader.read(0, 1), expert_blob(artifact.layout(0, 1), 1))
            assert torch.equal(reader.read(0, 0), expert_blob(artifact.layout(0, 0), 0))
        said = f"{artifact.folder / 'experts'}: direct reads are refused ({os.strerror(error)})"
        assert caplog.text.count(said) == 1

    def test_file_that_refuses_to_be_opened_directly_is_read_through_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        artifact = Artifact.open(copy_of_good(tmp_path))
        real = fcntl.fcntl

        def refusing(descriptor: int, command: int, flags: int = 0) -> int:
            if command == fcntl.F_SETFL and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, command, flags)

        monkeypatch.setattr(fcntl, "fcntl", refusing)
        with caplog.at_level(logging.INFO), DirectReader(artifact) as reader:
            assert torch.equal(reader.read(0, 1), expert_blob(artifact.layout(0, 1), 1))
        assert caplog.text.count("reading through the page cache") == 1

    def test_file_that_ends_within_a_page_is_reported(self, tmp_path: Path) -> None:
        folder = copy_of_good(tmp_path)
        with DirectReader(Artifact.open(folder)) as reader:
            cut(folder / LAYER, 17000)
            with pytest.raises(
                DamageError, match=r"layer 0 expert 1 at offset 12288: .* after 4712 of 8064"
            ):
                reader.read(0, 1)

    def test_file_cut_while_open_is_reported_with_layer_expert_and_offset(
        self, tmp_path: Path
    ) -> None:
        folder = copy_of_good(tmp_path)
        with DirectReader(Artifact.open(folder)) as reader:
            cut(folder / LAYER, 16384)
            reader.read(0, 0)
            with pytest.raises(
                DamageError,
                match=f"{LAYER}: layer 0 expert 1 at offset 12288: .* after 4096 of 8064",
            ):
                reader.read(0, 1)

    def test_file_cut_before_an_expert_is_reported(self, tmp_path: Path) -> None:
        folder = copy_of_good(tmp_path)
        with DirectReader(Artifact.open(folder)) as reader:
            cut(folder / LAYER, 0)
            with pytest.raises(
                DamageError,
                match="layer 0 expert 0 at offset 4096: the file ends after 0 of 8064 bytes",
            ):
                reader.read(0, 0)


def with_frame(parent: Path, frame: bytes) -> Artifact:
    """Write a compressed folder whose expert 1 is `frame`, and which is otherwise consistent."""

    frames = iter([None, frame])
    original = zstandard.ZstdCompressor

    class Compressor:
        """Compress as zstd does, but return `frame` the second time."""

        def __init__(self, **options: object) -> None:
            self._real = original(level=1)

        def compress(self, data: bytes) -> bytes:
            return next(frames) or self._real.compress(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("formats.writer.zstandard.ZstdCompressor", Compressor)
        return Artifact.open(write_folder(parent / "spoiled", codec="zstd"))
