"""The journal file of a conversion: its fingerprint and the records of finished work.

A line is the xxh3 of its JSON, a space, the JSON, and a line feed. The first line is the
fingerprint; each other line is a record.
"""

import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from converter.journal.records import Record
from formats import JOURNAL_NAME
from formats.checksums import xxh3_of
from formats.config.strict_json import parse
from formats.errors import OutputError
from formats.files.io_errors import translated
from formats.files.output_file import OutputFile, fsync_folder

_log = logging.getLogger(__name__)


class Journal:
    """Append-only file of lines with checksums.

    An incomplete last line is dropped. A damaged line counts as not written and is logged as a
    warning. A different or damaged fingerprint raises OutputError with the field: one folder never
    mixes two sources, recipes or code versions.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.path = folder / JOURNAL_NAME
        self.records: list[Record] = []
        """Records of earlier runs, oldest first."""
        self._file = OutputFile(self.path, keep=True)
        try:
            data = self._file.read_at(self._file.size_bytes, 0)
            data = data[: data.rfind(b"\n") + 1]
            lines = data.split(b"\n")[:-1]
            if lines:
                _compare(self.path, lines[0], fingerprint)
            for number, line in enumerate(lines[1:], 2):
                self._take(number, line)
            self._end = len(data)
            self._file.truncate(self._end)
            if not lines:
                self._append(json.dumps(fingerprint, sort_keys=True).encode())
                fsync_folder(folder)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Record) -> None:
        """Add a record durably. The bytes that it describes must be durable already."""
        self._append(msgspec.json.encode(record))

    def close(self) -> None:
        """Close the file and keep it."""
        self._file.close()

    def _append(self, text: bytes) -> None:
        line = xxh3_of(text).encode() + b" " + text + b"\n"
        self._file.write_at(line, self._end)
        self._file.sync()
        self._end += len(line)

    def _take(self, number: int, line: bytes) -> None:
        try:
            self.records.append(msgspec.json.decode(_checked(line) or b"", type=Record))
        except (msgspec.DecodeError, UnicodeDecodeError):
            _log.warning("%s: line %d is damaged: its work is done again", self.path, number)


def check_begun(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Raise what `Journal` would raise for the journal in `folder`; change nothing."""
    path = folder / JOURNAL_NAME
    if path.exists():
        with translated(path, "read"):
            first, end, _ = path.read_bytes().partition(b"\n")
        if end:
            _compare(path, first, fingerprint)


def _compare(path: Path, line: bytes, new: dict[str, Any]) -> None:
    old = _fingerprint(line)
    if old is None:
        raise OutputError(
            f"{path}: line 1 is damaged, so the conversion cannot resume",
            "start again with --no-resume",
        )
    new = json.loads(json.dumps(new))
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            raise OutputError(
                f"{path}: the folder holds an unfinished conversion with another {field}:"
                f" recorded {_short(old.get(field))}, now {_short(new.get(field))}",
                "use the recorded settings, choose another --out-dir, or start again with"
                " --no-resume",
            )


class Pin(msgspec.Struct, frozen=True):
    """Commit of the Hub repository that a conversion reads.

    asked: the revision that the user named, None for the default.
    """

    repo: str
    asked: str | None
    commit: str


def read_pin(folder: Path) -> Pin | None:
    """Return the pinned commit of an unfinished conversion in `folder`, None without one."""
    try:
        with open(folder / JOURNAL_NAME, "rb") as f:
            first = _fingerprint(f.readline(1 << 20).removesuffix(b"\n"))
    except OSError:
        return None
    try:
        return msgspec.convert(first and first.get("hub"), Pin | None)
    except msgspec.ValidationError:
        return None


def _checked(line: bytes) -> bytes | None:
    """Return the JSON of a line, None if its checksum is wrong."""
    checksum, _, text = line.partition(b" ")
    return text if xxh3_of(text).encode() == checksum else None


def _fingerprint(line: bytes) -> dict[str, Any] | None:
    """Return the fingerprint in the first line, None if the line is damaged."""
    try:
        value = parse(_checked(line) or b"", JOURNAL_NAME, error=ValueError)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:297] + "..."
