"""What of a conversion is done: the journal's records, compared with the bytes in partial and complete files."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from converter.complete_layer import difference
from converter.journal import Journal
from converter.records import ExpertRecord, LayerRecord, LinearRecord, Record, RecordKey, ShardRecord, TensorRecord
from converter.sizes import OutputPlan
from formats import TRUNK_NAME
from formats.layer_file import compression_paths, layer_file_name, partial_path
from formats.output_file import remove, rename
from formats.writer import LayerWriter, PlacedFile

_log = logging.getLogger(__name__)


class FinishedWork:
    """The records of earlier runs and of this one, by key, and the files that they are about, opened to go on.

    A record counts only while its bytes have its checksum: a file that lost or changed them loses the record, with a
    warning, and the work is done again. A complete layer file that changed becomes partial again.
    """

    def __init__(self, out: Path, plan: OutputPlan, fingerprint: dict[str, Any]) -> None:
        self._out, self._plan = out, plan
        self._journal = Journal(out, fingerprint)
        self._records: dict[RecordKey, Record] = {record.key: record for record in self._journal.records}

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._records

    @property
    def records(self) -> list[Record]:
        """All of them."""
        return list(self._records.values())

    def add(self, record: Record) -> None:
        """Records a piece of work, durably; its bytes are durable already."""
        self._journal.append(record)
        self._records[record.key] = record

    def shard_sha256(self, name: str) -> str | None:
        """The sha256 of a file of the source, if it was recorded."""
        record = self._records.get(("shard", name))
        return record.sha256 if isinstance(record, ShardRecord) else None

    def layer(self, layer: int) -> LayerRecord | None:
        """The record of a complete layer file."""
        record = self._records.get(("layer", layer))
        return record if isinstance(record, LayerRecord) else None

    def has_experts(self, layer: int) -> bool:
        """True if all experts of a layer are recorded."""
        return all(("expert", layer, expert) in self for expert in range(len(self._plan.layouts[layer])))

    def open_layer(self, layer: int) -> LayerWriter | None:
        """The writer of a layer's file, None if the file is complete."""
        final = self._out / layer_file_name(layer)
        # Without an expert's record its errors are unknown, and quality.json needs them.
        if self.has_experts(layer) and self._is_complete(final, layer):
            # A power loss may bring back what was removed.
            for path in (partial_path(final), *compression_paths(final)):
                remove(path)
            return None
        self._records.pop(("layer", layer), None)
        self._reopen(final)
        writer = LayerWriter(final, layer, self._plan.shape.experts[layer].path, self._plan.layouts[layer])
        for expert in range(len(self._plan.layouts[layer])):
            done = self._records.get(("expert", layer, expert))
            if isinstance(done, ExpertRecord) and (writer.fresh or writer.expert_xxh3(expert) != done.xxh3):
                self._forget(done, partial_path(final), fresh=writer.fresh)
        return writer

    def open_trunk(self) -> PlacedFile:
        """The trunk's file."""
        self._reopen(self._out / TRUNK_NAME)
        trunk = PlacedFile(self._out / TRUNK_NAME, self._plan.trunk_entries, self._plan.trunk_metadata)
        for record in self.records:
            if isinstance(record, LinearRecord | TensorRecord):
                name = f"{record.module}.packed" if isinstance(record, LinearRecord) else record.name
                if trunk.fresh or trunk.xxh3(name) != record.xxh3:
                    self._forget(record, partial_path(trunk.path), fresh=trunk.fresh)
        return trunk

    def finish_layer(self, writer: LayerWriter, layer: int, codec: str) -> None:
        """Gives a layer's file, whose experts are all recorded, its name, and records where they lie."""
        layouts = self._plan.layouts[layer]
        done = [self._records["expert", layer, expert] for expert in range(len(layouts))]
        experts = [record for record in done if isinstance(record, ExpertRecord)]
        if codec == "zstd":
            header, places = writer.finish_zstd([record.xxh3 for record in experts])
        else:
            writer.finish()
            header = writer.header
            places = [
                (offset, layout.n_bytes, record.sha256, record.xxh3)
                for offset, layout, record in zip(writer.offsets, layouts, experts, strict=True)
            ]
        size = (self._out / layer_file_name(layer)).stat().st_size
        self.add(LayerRecord(layer, size, hashlib.sha256(header).hexdigest(), places))

    def close(self) -> None:
        """Closes the journal and keeps it."""
        self._journal.close()

    def _is_complete(self, final: Path, layer: int) -> bool:
        """True if a layer's file has its name and the bytes of its record."""
        record = self.layer(layer)
        if record is None or not final.exists():
            return False
        found = difference(final, record)
        if found:
            _log.warning("%s: %s: the file is partial again, and its lost experts are converted again", final, found)
        return found is None

    def _forget(self, record: Record, path: Path, *, fresh: bool) -> None:
        del self._records[record.key]
        if not fresh:
            what = " ".join(str(part) for part in record.key)
            _log.warning("%s: the bytes of %s changed since they were written: converting it again", path, what)

    def _reopen(self, final: Path) -> None:
        """Makes a file that has its final name but no record of being complete partial again."""
        if final.exists() and not partial_path(final).exists():
            rename(final, partial_path(final))
