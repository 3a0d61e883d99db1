"""What of a conversion is done: the records of earlier runs and of this one, by key, over the
journal.
"""

from pathlib import Path
from typing import Any

from converter.journal.journal_file import Journal
from converter.journal.keys import ExpertKey, LayerKey, RecordKey, ShardKey
from converter.journal.records import ExpertRecord, LayerRecord, Record, ShardRecord


class FinishedWork:
    """The records of the conversion in folder `out`; close it. Errors as `Journal`."""

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self._journal = Journal(out, fingerprint)
        self._records: dict[RecordKey, Record] = {
            record.key: record for record in self._journal.records
        }

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

    def forget(self, key: RecordKey) -> None:
        """Counts a piece of work as not done; the journal gets another record of it when it is done
        again.
        """
        del self._records[key]

    def shard_sha256(self, name: str) -> str | None:
        """The sha256 of a file of the source, if it was recorded."""
        record = self._records.get(ShardKey(name))
        return record.sha256 if isinstance(record, ShardRecord) else None

    def layer(self, layer: int) -> LayerRecord | None:
        """The record of a complete layer file."""
        record = self._records.get(LayerKey(layer))
        return record if isinstance(record, LayerRecord) else None

    def experts(self, layer: int, count: int) -> list[ExpertRecord]:
        """The records of a layer's experts, ascending; count: how many experts the layer has."""
        records = (self._records.get(ExpertKey(layer, expert)) for expert in range(count))
        return [record for record in records if isinstance(record, ExpertRecord)]

    def close(self) -> None:
        """Closes the journal and keeps it."""
        self._journal.close()
