"""Writers: whole files that appear atomically, and layer files filled in any order."""

from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
import xxhash
import zstandard

from formats.checksums import Checksums, xxh3_of
from formats.errors import OutputError
from formats.expert import ExpertLayout
from formats.files.output_file import OutputFile, remove
from formats.files.partial_file import partial_path
from formats.layer_file import (
    FILLER_PREFIX,
    compression_paths,
    expert_prefix,
    layer_metadata,
    raw_entries,
    zstd_entries,
)
from formats.safetensors_header import TensorEntry, build_header

ZSTD_LEVEL = 19
"""Packed codes hardly shrink (docs/format.md); only high levels gain anything."""

_READ_BYTES = 16 << 20


class Place(NamedTuple):
    """Place of an expert's stored bytes in its file, and their checksums."""

    offset: int
    """Offset in bytes from the start of the file."""
    length: int
    """Size in bytes, without filler."""
    sha256: str
    xxh3: str


class PlacedFile:
    """A safetensors file under construction, named `<name>.partial` until `finish`.

    `entries` are its tensors in file order, fillers included. The constructor writes the header.
    Tensors may be written in any order, by several threads, and again after a crash: the bytes are
    the same.
    """

    def __init__(self, path: Path, entries: list[TensorEntry], metadata: dict[str, str]) -> None:
        self.path = path
        self.header = build_header(entries, metadata)
        self.size_bytes = len(self.header) + (entries[-1].end if entries else 0)
        self._entries = {entry.name: entry for entry in entries}
        self._file = OutputFile(partial_path(path), keep=True)
        try:
            self.fresh = self._file.size_bytes != self.size_bytes
            """True if there was no partial file of this size to continue."""
            if self.fresh:
                self._file.truncate(0)
                self._file.allocate(self.size_bytes)
            self._file.write_at(self.header, 0)
            for entry in entries:
                # An old partial file of the same size may hold other bytes here.
                if entry.name.startswith(FILLER_PREFIX):
                    self._file.write_at(bytes(entry.n_bytes), self.offset(entry.name))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def offset(self, name: str) -> int:
        """Return the start of a tensor, in bytes from the start of the file."""
        return len(self.header) + self._entries[name].begin

    def write(self, name: str, data: torch.Tensor, skip_bytes: int = 0) -> None:
        """Write `data` (uint8, contiguous) into tensor `name`, `skip_bytes` from its start.

        The bytes are durable only after `sync`.
        """
        entry = self._entries[name]
        if skip_bytes + data.numel() > entry.n_bytes:
            raise ValueError(
                f"{data.numel()} bytes at {skip_bytes} do not fit into {name}"
                f" of {entry.n_bytes} bytes"
            )
        self._file.write_at(data.view(-1).numpy().data, len(self.header) + entry.begin + skip_bytes)

    def xxh3(self, name: str) -> str:
        """Read tensor `name` from the file and return its xxh3, in hex."""
        return self._xxh3(self.offset(name), self._entries[name].n_bytes)

    def _xxh3(self, offset: int, n_bytes: int) -> str:
        checksum = xxhash.xxh3_128()
        for begin in range(offset, offset + n_bytes, _READ_BYTES):
            checksum.update(self._file.read_at(min(_READ_BYTES, offset + n_bytes - begin), begin))
        return checksum.hexdigest()

    def sync(self) -> None:
        """Flush written bytes to the disk."""
        self._file.sync()

    def finish(self) -> None:
        """Rename the complete file to its final name, durably."""
        self._file.finish(self.path)

    def close(self) -> None:
        """Close the file. An unfinished one keeps its partial name."""
        self._file.close()


class LayerWriter(PlacedFile):
    """A layer file under construction.

    `layouts[e]` is the layout of expert e, `offsets[e]` its start in bytes. `module` is the path of
    the layer's experts in the model.
    """

    def __init__(self, path: Path, layer: int, module: str, layouts: list[ExpertLayout]) -> None:
        super().__init__(
            path, raw_entries(module, layouts), layer_metadata(layer, module, layouts, "none")
        )
        self._layer = layer
        self._module = module
        self._layouts = layouts
        self.offsets = [
            self.offset(f"{expert_prefix(module, expert)}.gate_up")
            for expert in range(len(layouts))
        ]

    def write_expert(self, expert: int, blob: torch.Tensor) -> Checksums:
        """Write an expert's bytes (uint8 [n_bytes], contiguous) durably; return their checksums."""
        self.place_expert(expert, blob)
        return Checksums.from_bytes(blob.numpy().data)

    def place_expert(self, expert: int, blob: torch.Tensor) -> None:
        """Write an expert's bytes durably, without checksums."""
        n_bytes = self._layouts[expert].n_bytes
        if blob.dtype != torch.uint8 or blob.shape != (n_bytes,):
            raise ValueError(
                f"expert of {blob.dtype} {list(blob.shape)}, its layout takes uint8 [{n_bytes}]"
            )
        self._file.write_at(blob.numpy().data, self.offsets[expert])
        self.sync()

    def expert_xxh3(self, expert: int) -> str:
        """Read an expert from the file and return its xxh3, in hex."""
        return self._xxh3(self.offsets[expert], self._layouts[expert].n_bytes)

    def finish_zstd(self, written: list[str]) -> tuple[bytes, list[Place]]:
        """Compress every expert into the final file; return its header and the experts' places.

        `written[e]` is the xxh3 of expert e when it was written. Raises OutputError if the file has
        other bytes now.
        """
        # The header precedes the frames and needs their lengths, so the frames go to a side file.
        compressed, spool = compression_paths(self.path)
        with OutputFile(spool) as frames, OutputFile(compressed) as out:
            lengths, checksums = self._compress(frames, written)
            entries = zstd_entries(self._module, lengths)
            metadata = layer_metadata(self._layer, self._module, self._layouts, "zstd")
            header = build_header(entries, metadata)
            out.write_at(header, 0)
            places: list[Place] = []
            for entry in entries:
                offset = len(header) + entry.begin
                data = bytes(entry.n_bytes)
                if entry.name.endswith(".zstd"):
                    data = _read_exactly(frames, entry.n_bytes, sum(lengths[: len(places)]))
                    places.append(Place(offset, entry.n_bytes, *checksums[len(places)]))
                out.write_at(data, offset)
            self.close()
            out.finish(self.path)
        remove(spool)
        remove(partial_path(self.path))
        return header, places

    def _compress(
        self, frames: OutputFile, written: list[str]
    ) -> tuple[list[int], list[Checksums]]:
        """Write one zstd frame per expert to `frames`; return the frames' lengths and checksums."""
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        lengths: list[int] = []
        checksums: list[Checksums] = []
        for expert, layout in enumerate(self._layouts):
            data = _read_exactly(self._file, layout.n_bytes, self.offsets[expert])
            if xxh3_of(data) != written[expert]:
                raise OutputError(
                    f"{self._file.path}: the bytes of expert {expert}"
                    " changed since they were written",
                    "check the disk, and run the same command again",
                )
            frame = compressor.compress(data)
            frames.write_at(frame, sum(lengths))
            lengths.append(len(frame))
            checksums.append(Checksums.from_bytes(frame))
        return lengths, checksums


def _read_exactly(file: OutputFile, n_bytes: int, offset: int) -> bytes:
    data = file.read_at(n_bytes, offset)
    if len(data) != n_bytes:
        raise OutputError(f"{file.path} was cut off while it was being written")
    return data
