"""The journal of a conversion: what is done, durably, one JSON line each; and what it was done from."""

import json
from pathlib import Path
from typing import Any

from formats.errors import OutputError
from formats.output_file import OutputFile, fsync_folder

JOURNAL_NAME = ".moe-convert.journal"


class Journal:
    """An append-only file of JSON lines; the first is the fingerprint, a torn last line is dropped.

    Opening one whose fingerprint differs raises OutputError naming the field: two sources, recipes or code versions
    are never mixed in one folder.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.path = folder / JOURNAL_NAME
        self._file = OutputFile(self.path, keep=True)
        try:
            data = self._file.read_at(self._file.size_bytes, 0)
            data = data[: data.rfind(b"\n") + 1]
            lines = [self._line(number, line) for number, line in enumerate(data.splitlines(), 1)]
            if lines:
                self._compare(lines[0], fingerprint)
            self.records: list[dict[str, Any]] = lines[1:]
            """What earlier runs recorded, oldest first."""
            self._end = len(data)
            self._file.truncate(self._end)
            if not lines:
                self.append(fingerprint)
                fsync_folder(folder)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record durably; what it speaks of must be durable before."""
        data = json.dumps(record, sort_keys=True).encode() + b"\n"
        self._file.write_at(data, self._end)
        self._file.sync()
        self._end += len(data)

    def close(self) -> None:
        """Closes the file and keeps it."""
        self._file.close()

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise OutputError(f"{self.path}: line {number} is damaged", "start again with --no-resume")
        return record

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for field in sorted(old.keys() | new.keys()):
            if old.get(field) != new.get(field):
                raise OutputError(
                    f"{self.path}: this folder holds an unfinished conversion with another {field}:"
                    f" {_short(old.get(field))} there, {_short(new.get(field))} now",
                    "resume with what it was begun with, choose another --out-dir, or start again with --no-resume",
                )


def read_pin(folder: Path) -> dict[str, Any] | None:
    """Repository, revision and commit that an unfinished conversion in `folder` was begun from; None if from no Hub."""
    try:
        with open(folder / JOURNAL_NAME, "rb") as f:
            pin = json.loads(f.readline(1 << 20)).get("hub")
    except (OSError, ValueError, AttributeError):
        return None
    return pin if isinstance(pin, dict) and isinstance(pin.get("commit"), str) else None


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:297] + "..."
