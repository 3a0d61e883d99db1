"""The trunk and layer files under construction; a resume compares them with the journal."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import xxhash

from converter.journal.finished_work import FinishedWork
from converter.journal.keys import ExpertKey, LinearKey, TensorKey
from converter.journal.records import ExpertRecord, LayerRecord, LinearRecord, TensorRecord
from converter.output.complete_layer import difference
from converter.output.conversion_sizes import OutputPlan
from formats import TRUNK_NAME
from formats.files.output_file import remove, rename
from formats.files.partial_file import partial_path
from formats.layer_file import compression_paths, layer_file_name
from formats.writer import LayerWriter, Place, PlacedFile

_log = logging.getLogger(__name__)


class OutputFiles:
    """The files in folder `out`. Thread-safe. Close them, or use them as a context.

    Closing keeps partial files. A record counts only while its bytes have its checksum: if a file
    lost or changed them, `work` forgets the record, with a warning, and the unit is converted
    again. A complete layer file that changed becomes partial again.
    """

    def __init__(
        self, out: Path, plan: OutputPlan, codec: str, work: FinishedWork, layers: Sequence[int]
    ) -> None:
        self._out = out
        self._plan = plan
        self._codec = codec
        self._work = work
        self._layers: dict[int, LayerWriter] = {}
        self.trunk = self._open_trunk()
        if recorded := [layer for layer in layers if work.layer(layer)]:
            _log.info("%s: comparing %d complete layer files with the journal", out, len(recorded))
        try:
            for layer in layers:
                if not self._is_complete(layer):
                    self._layers[layer] = self._open_layer(layer)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "OutputFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_expert(self, key: ExpertKey, data: torch.Tensor) -> None:
        """Write an expert's bytes (uint8) durably."""
        self._layers[key.layer].place_expert(key.expert, data)

    def write_linear(self, key: LinearKey, tiles: torch.Tensor) -> None:
        """Write a packed matrix of the trunk durably."""
        write_linear(self.trunk, key, tiles)

    def write_tensor(self, key: TensorKey, blocks: Iterator[torch.Tensor]) -> TensorRecord:
        """Write a tensor of the trunk durably; see the function `write_tensor`."""
        return write_tensor(self.trunk, key, blocks)

    def finish_layer(self, layer: int) -> None:
        """Complete a layer's file once all of its experts are recorded, and record the file."""
        if layer not in self._layers or not self._has_experts(layer):
            return
        writer = self._layers.pop(layer)
        with writer:
            header, places = self._finish(writer, layer)
        size_bytes = (self._out / layer_file_name(layer)).stat().st_size
        self._work.add(LayerRecord(layer, size_bytes, hashlib.sha256(header).hexdigest(), places))

    def close(self) -> None:
        """Close all open files."""
        for writer in self._layers.values():
            writer.close()
        self.trunk.close()

    def _finish(self, writer: LayerWriter, layer: int) -> tuple[bytes, list[Place]]:
        """Complete the file; return its header and the place of each expert."""
        records = self._experts(layer)
        if self._codec == "zstd":
            return writer.finish_zstd([record.xxh3 for record in records])
        writer.finish()
        layouts = self._plan.layouts[layer]
        places = [
            Place(offset, layout.n_bytes, record.sha256, record.xxh3)
            for offset, layout, record in zip(writer.offsets, layouts, records, strict=True)
        ]
        return writer.header, places

    def _is_complete(self, layer: int) -> bool:
        """True if a layer's file is complete and has the bytes of its record.

        Then stale partial files are removed.
        """
        path = self._out / layer_file_name(layer)
        record = self._work.layer(layer)
        # quality.json needs the errors that only the experts' records hold.
        if record is None or not self._has_experts(layer) or not path.exists():
            return False
        if reason := difference(path, record):
            _log.warning(
                "%s: %s: the file is partial again, and its lost experts are converted again",
                path,
                reason,
            )
            return False
        # A power loss may bring removed files back.
        for stale in (partial_path(path), *compression_paths(path)):
            remove(stale)
        return True

    def _open_layer(self, layer: int) -> LayerWriter:
        path = self._out / layer_file_name(layer)
        _reopen(path)
        module = self._plan.shape.experts[layer].path
        writer = LayerWriter(path, layer, module, self._plan.layouts[layer])
        for record in self._experts(layer):
            if writer.fresh or writer.expert_xxh3(record.expert) != record.xxh3:
                self._forget(record, writer)
        return writer

    def _open_trunk(self) -> PlacedFile:
        path = self._out / TRUNK_NAME
        _reopen(path)
        trunk = PlacedFile(path, self._plan.trunk_entries, self._plan.trunk_metadata)
        for record in self._work.records:
            if isinstance(record, LinearRecord | TensorRecord):
                name = _packed_name(record.key) if isinstance(record, LinearRecord) else record.name
                if trunk.fresh or trunk.xxh3(name) != record.xxh3:
                    self._forget(record, trunk)
        return trunk

    def _experts(self, layer: int) -> list[ExpertRecord]:
        return self._work.experts(layer, len(self._plan.layouts[layer]))

    def _has_experts(self, layer: int) -> bool:
        return len(self._experts(layer)) == len(self._plan.layouts[layer])

    def _forget(self, record: ExpertRecord | LinearRecord | TensorRecord, file: PlacedFile) -> None:
        self._work.forget(record.key)
        if not file.fresh:
            _log.warning(
                "%s: the bytes of %s changed since they were written: converting it again",
                partial_path(file.path),
                record.key,
            )


def write_linear(trunk: PlacedFile, key: LinearKey, tiles: torch.Tensor) -> None:
    """Write a packed matrix into the trunk's file durably."""
    trunk.write(_packed_name(key), tiles)
    trunk.sync()


def write_tensor(trunk: PlacedFile, key: TensorKey, blocks: Iterator[torch.Tensor]) -> TensorRecord:
    """Write a tensor into the trunk's file durably; return its record.

    blocks: the tensor's bytes in order, uint8.
    """
    checksum = xxhash.xxh3_128()
    written_bytes = 0
    for block in blocks:
        trunk.write(key.name, block, written_bytes)
        checksum.update(block.numpy().data)
        written_bytes += block.numel()
    trunk.sync()
    return TensorRecord(key.name, checksum.hexdigest())


def _packed_name(key: LinearKey) -> str:
    return f"{key.module}.packed"


def _reopen(path: Path) -> None:
    """Rename a file without a record of being complete back to its partial name."""
    if path.exists() and not partial_path(path).exists():
        rename(path, partial_path(path))
