"""Writing: whole files that appear at once, and layer files whose experts come in any order."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import zstandard

from formats.checksums import Checksums
from formats.errors import OutputError
from formats.expert import ExpertLayout
from formats.layer_file import FILLER_PREFIX, expert_prefix, layer_metadata, partial_path, raw_entries, zstd_entries
from formats.safetensors_header import TensorEntry, build_header

ZSTD_LEVEL = 19
"""Packed codes hardly shrink (docs/format.md); what little there is to win needs the high levels."""


Place = tuple[int, int, str, str]
"""Where an expert's stored bytes lie in its file, and their checksums: offset, length, sha256, xxh3."""


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name, then fsync, rename, fsync of the folder."""
    partial = partial_path(path)
    with open(partial, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)


class PlacedFile:
    """A safetensors file under construction, `<name>.partial`: header first, then each tensor at its own place.

    `entries` are its tensors in file order, fillers included. Tensors may be written in any order, from several
    threads, and again after a kill: the bytes are the same. `finish` gives the file its name.
    """

    def __init__(self, path: Path, entries: list[TensorEntry], metadata: dict[str, str]) -> None:
        self.path = path
        self.header = build_header(entries, metadata)
        self.size_bytes = len(self.header) + (entries[-1].end if entries else 0)
        self._entries = {entry.name: entry for entry in entries}
        self._descriptor = os.open(partial_path(path), os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        self.fresh = os.fstat(self._descriptor).st_size != self.size_bytes
        """Whether nothing was there to go on with."""
        # Space for the whole file now, so that a full disk shows before an hour of work.
        if self.fresh:
            os.ftruncate(self._descriptor, 0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._descriptor, 0, self.size_bytes)
            else:
                os.ftruncate(self._descriptor, self.size_bytes)
        _write_at(self._descriptor, memoryview(self.header), 0)
        for entry in entries:
            if entry.name.startswith(FILLER_PREFIX):  # a partial of the same size may hold anything there
                _write_at(self._descriptor, memoryview(bytes(entry.n_bytes)), self.offset(entry.name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def offset(self, name: str) -> int:
        """Where a tensor begins, in bytes from the start of the file."""
        return len(self.header) + self._entries[name].begin

    def write(self, name: str, data: torch.Tensor, skip_bytes: int = 0) -> None:
        """Writes bytes (uint8, contiguous) at `skip_bytes` into tensor `name`; not yet durable (`sync`)."""
        entry = self._entries[name]
        if skip_bytes + data.numel() > entry.n_bytes:
            raise ValueError(f"{data.numel()} bytes at {skip_bytes} do not fit into {name} of {entry.n_bytes} bytes")
        _write_at(self._descriptor, data.view(-1).numpy().data, len(self.header) + entry.begin + skip_bytes)

    def sync(self) -> None:
        """Makes what was written durable."""
        os.fsync(self._descriptor)

    def finish(self) -> None:
        """Gives the complete file its name, durably."""
        self.sync()
        self.close()
        os.replace(partial_path(self.path), self.path)
        fsync_folder(self.path.parent)

    def close(self) -> None:
        """Closes the file and keeps the partial."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LayerWriter(PlacedFile):
    """A layer's file; `layouts[e]` is expert e's, `offsets[e]` is where it begins, in bytes."""

    def __init__(self, path: Path, layer: int, layouts: list[ExpertLayout]) -> None:
        super().__init__(path, raw_entries(layer, layouts), layer_metadata(layer, layouts, "none"))
        self._layer = layer
        self._layouts = layouts
        self.offsets = [self.offset(f"{expert_prefix(layer, expert)}.gate_up") for expert in range(len(layouts))]

    def write_expert(self, expert: int, blob: torch.Tensor) -> Checksums:
        """Writes expert `expert`'s bytes (uint8 [n_bytes], contiguous) durably; returns their checksums."""
        n_bytes = self._layouts[expert].n_bytes
        if blob.dtype != torch.uint8 or blob.shape != (n_bytes,):
            raise ValueError(f"expert of {blob.dtype} {list(blob.shape)}, its layout takes uint8 [{n_bytes}]")
        data = blob.numpy().data
        _write_at(self._descriptor, data, self.offsets[expert])
        self.sync()
        return Checksums.of(data)

    def finish_zstd(self) -> tuple[bytes, list[Place]]:
        """Compresses every expert into the final file; returns its header and where each expert lies."""
        lengths: list[int] = []
        compressed = self.path.with_name(self.path.name + ".zstd.partial")
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        # Frames first into a side file: the header before them needs their lengths.
        spool = self.path.with_name(self.path.name + ".frames.partial")
        checksums: list[Checksums] = []
        with open(spool, "wb+") as frames, open(compressed, "wb") as out:
            for expert in range(len(self._layouts)):
                frame = compressor.compress(self._read_expert(expert))
                frames.write(frame)
                lengths.append(len(frame))
                checksums.append(Checksums.of(frame))
            entries = zstd_entries(self._layer, lengths)
            header = build_header(entries, layer_metadata(self._layer, self._layouts, "zstd"))
            out.write(header)
            frames.seek(0)
            places: list[Place] = []
            for entry in entries:
                if entry.name.endswith(".zstd"):
                    places.append((len(header) + entry.begin, entry.n_bytes, *checksums[len(places)]))
                    out.write(frames.read(entry.n_bytes))
                else:
                    out.write(bytes(entry.n_bytes))
            out.flush()
            os.fsync(out.fileno())
        os.unlink(spool)
        self.close()
        os.replace(compressed, self.path)
        fsync_folder(self.path.parent)
        os.unlink(partial_path(self.path))
        return header, places

    def _read_expert(self, expert: int) -> bytes:
        length = self._layouts[expert].n_bytes
        data = os.pread(self._descriptor, length, self.offsets[expert])
        if len(data) != length:
            raise OutputError(f"{partial_path(self.path)} was cut off while it was being written")
        return data


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
