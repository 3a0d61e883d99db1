"""Writing: whole files that appear at once, and layer files whose experts come in any order."""

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
from formats.layer_file import (
    FILLER_PREFIX,
    compression_paths,
    expert_prefix,
    layer_metadata,
    partial_path,
    raw_entries,
    zstd_entries,
)
from formats.safetensors_header import TensorEntry, build_header

ZSTD_LEVEL = 19
"""Packed codes hardly shrink (docs/format.md); what little there is to win needs the high levels.
"""


_READ_BYTES = 16 << 20


class Place(NamedTuple):
    """Where an expert's stored bytes lie in its file, in bytes, and their checksums."""

    offset: int
    length: int
    sha256: str
    xxh3: str


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name, then fsync, rename, fsync of the folder."""
    with OutputFile(partial_path(path)) as file:
        file.write_at(data, 0)
        file.finish(path)


class PlacedFile:
    """A safetensors file under construction, `<name>.partial`: header first, then each tensor at
    its own place.

    `entries` are its tensors in file order, fillers included. Tensors may be written in any order,
    from several threads, and again after a kill: the bytes are the same. `finish` gives the file
    its name.
    """

    def __init__(self, path: Path, entries: list[TensorEntry], metadata: dict[str, str]) -> None:
        self.path = path
        self.header = build_header(entries, metadata)
        self.size_bytes = len(self.header) + (entries[-1].end if entries else 0)
        self._entries = {entry.name: entry for entry in entries}
        self._file = OutputFile(partial_path(path), keep=True)
        try:
            self.fresh = self._file.size_bytes != self.size_bytes
            """Whether nothing was there to go on with."""
            if self.fresh:
                self._file.truncate(0)
                self._file.allocate(self.size_bytes)
            self._file.write_at(self.header, 0)
            for entry in entries:
                if entry.name.startswith(
                    FILLER_PREFIX
                ):  # a partial of the same size may hold anything there
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
        """Where a tensor begins, in bytes from the start of the file."""
        return len(self.header) + self._entries[name].begin

    def write(self, name: str, data: torch.Tensor, skip_bytes: int = 0) -> None:
        """Writes bytes (uint8, contiguous) at `skip_bytes` into tensor `name`; not yet durable
        (`sync`).
        """
        entry = self._entries[name]
        if skip_bytes + data.numel() > entry.n_bytes:
            raise ValueError(
                f"{data.numel()} bytes at {skip_bytes} do not fit into {name} of {entry.n_bytes} bytes"
            )
        self._file.write_at(data.view(-1).numpy().data, len(self.header) + entry.begin + skip_bytes)

    def xxh3(self, name: str) -> str:
        """The xxh3 of the bytes of tensor `name` as they are in the file, in hex."""
        return self._xxh3(self.offset(name), self._entries[name].n_bytes)

    def _xxh3(self, offset: int, n_bytes: int) -> str:
        checksum = xxhash.xxh3_128()
        for begin in range(offset, offset + n_bytes, _READ_BYTES):
            checksum.update(self._file.read_at(min(_READ_BYTES, offset + n_bytes - begin), begin))
        return checksum.hexdigest()

    def sync(self) -> None:
        """Makes what was written durable."""
        self._file.sync()

    def finish(self) -> None:
        """Gives the complete file its name, durably."""
        self._file.finish(self.path)

    def close(self) -> None:
        """Closes the file and keeps the partial."""
        self._file.close()


class LayerWriter(PlacedFile):
    """A layer's file; `layouts[e]` is expert e's, `offsets[e]` is where it begins, in bytes.
    module: the path of the layer's experts in the model.
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
        """Writes expert `expert`'s bytes (uint8 [n_bytes], contiguous) durably; returns their
        checksums.
        """
        self.place_expert(expert, blob)
        return Checksums.of(blob.numpy().data)

    def place_expert(self, expert: int, blob: torch.Tensor) -> None:
        """Writes an expert's bytes, as `write_expert`; computes no checksums."""
        n_bytes = self._layouts[expert].n_bytes
        if blob.dtype != torch.uint8 or blob.shape != (n_bytes,):
            raise ValueError(
                f"expert of {blob.dtype} {list(blob.shape)}, its layout takes uint8 [{n_bytes}]"
            )
        self._file.write_at(blob.numpy().data, self.offsets[expert])
        self.sync()

    def expert_xxh3(self, expert: int) -> str:
        """The xxh3 of an expert's bytes as they are in the file, in hex."""
        return self._xxh3(self.offsets[expert], self._layouts[expert].n_bytes)

    def finish_zstd(self, written: list[str]) -> tuple[bytes, list[Place]]:
        """Compresses every expert into the final file; returns its header and where each expert
        lies.

        written: the xxh3 of each expert as it was written. OutputError if the file has other bytes
        now.
        """
        lengths: list[int] = []
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
        # Frames first into a side file: the header before them needs their lengths.
        compressed, spool = compression_paths(self.path)
        checksums: list[Checksums] = []
        with OutputFile(spool) as frames, OutputFile(compressed) as out:
            for expert in range(len(self._layouts)):
                data = _whole(self._file, self._layouts[expert].n_bytes, self.offsets[expert])
                if xxh3_of(data) != written[expert]:
                    raise OutputError(
                        f"{self._file.path}: the bytes of expert {expert} changed since they were written",
                        "check the disk, and run the same command again",
                    )
                frame = compressor.compress(data)
                frames.write_at(frame, sum(lengths))
                lengths.append(len(frame))
                checksums.append(Checksums.of(frame))
            entries = zstd_entries(self._module, lengths)
            header = build_header(
                entries, layer_metadata(self._layer, self._module, self._layouts, "zstd")
            )
            out.write_at(header, 0)
            places: list[Place] = []
            for entry in entries:
                offset, data = len(header) + entry.begin, bytes(entry.n_bytes)
                if entry.name.endswith(".zstd"):
                    data = _whole(frames, entry.n_bytes, sum(lengths[: len(places)]))
                    places.append(Place(offset, entry.n_bytes, *checksums[len(places)]))
                out.write_at(data, offset)
            self.close()
            out.finish(self.path)
        remove(spool)
        remove(partial_path(self.path))
        return header, places


def _whole(file: OutputFile, n_bytes: int, offset: int) -> bytes:
    data = file.read_at(n_bytes, offset)
    if len(data) != n_bytes:
        raise OutputError(f"{file.path} was cut off while it was being written")
    return data
