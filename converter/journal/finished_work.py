"""Finished work of a conversion: the latest record of each key, kept in the journal."""

from pathlib import Path
from typing import Any

from converter.journal.journal_file import Journal
from converter.journal.keys import ExpertKey, LayerKey, RecordKey, ShardKey
from converter.journal.records import ExpertRecord, LayerRecord, Record, ShardRecord


class FinishedWork:
    """Records of the conversion in folder `out`, from earlier runs and this one.

    Close it after use. Raises what `Journal` raises.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self._journal = Journal(out, fingerprint)
        self._records: dict[RecordKey, Record] = {
            record.key: record for record in self._journal.records
        }

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._records

    @property
    def records(self) -> list[Record]:
        """The latest record of each key."""
        return list(self._records.values())

    def add(self, record: Record) -> None:
        """Record a piece of work durably. Its bytes must be durable already."""
        self._journal.append(record)
        self._records[record.key] = record

    def forget(self, key: RecordKey) -> None:
        """Count a piece of work as not done; its next record replaces the one in the journal."""
        del self._records[key]

    def shard_sha256(self, name: str) -> str | None:
        """Return the recorded sha256 of a source shard, None if there is none."""
        record = self._records.get(ShardKey(name))
        return record.sha256 if isinstance(record, ShardRecord) else None

    def layer(self, layer: int) -> LayerRecord | None:
        """Return the record of a complete layer file, None if there is none."""
        record = self._records.get(LayerKey(layer))
        return record if isinstance(record, LayerRecord) else None

    def experts(self, layer: int, count: int) -> list[ExpertRecord]:
        """Return the records of a layer's experts in ascending order.

        count: number of experts of the layer.
        """
        records = (self._records.get(ExpertKey(layer, expert)) for expert in range(count))
        return [record for record in records if isinstance(record, ExpertRecord)]

    def close(self) -> None:
        """Close the journal and keep its file."""
        self._journal.close()
