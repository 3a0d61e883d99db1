"""The journal of a conversion: what is done, durably, one line each; and what it was done from.

A line is the xxh3 of its JSON, a space, the JSON, and a line feed. The first is the fingerprint,
each other a record.
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
    """An append-only file of checked lines.

    A torn last line is dropped. A damaged line counts as not written, with a warning: its work is
    done again. Opening a journal whose fingerprint differs or is damaged raises OutputError naming
    the field: two sources, recipes or code versions are never mixed in one folder.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.path = folder / JOURNAL_NAME
        self.records: list[Record] = []
        """What earlier runs recorded, oldest first."""
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
        """Adds a record durably; what it speaks of must be durable before."""
        self._append(msgspec.json.encode(record))

    def close(self) -> None:
        """Closes the file and keeps it."""
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
    """Raises what `Journal` would raise for an unfinished conversion in `folder`; changes nothing."""
    path = folder / JOURNAL_NAME
    if path.exists():
        with translated(path, "read"):
            first, end, _ = path.read_bytes().partition(b"\n")
        if end:
            _compare(path, first, fingerprint)


def _compare(path: Path, line: bytes, new: dict[str, Any]) -> None:
    old = _fingerprint(line)
    if old is None:
        raise OutputError(f"{path}: line 1 is damaged", "start again with --no-resume")
    new = json.loads(json.dumps(new))
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            raise OutputError(
                f"{path}: this folder holds an unfinished conversion with another {field}:"
                f" {_short(old.get(field))} there, {_short(new.get(field))} now",
                "resume with what it was begun with, choose another --out-dir, or start again with --no-resume",
            )


class Pin(msgspec.Struct, frozen=True):
    """The commit of a Hub repository that a conversion is made from. asked: the revision that the
    user named.
    """

    repo: str
    asked: str | None
    commit: str


def read_pin(folder: Path) -> Pin | None:
    """What an unfinished conversion in `folder` was begun from; None if from no Hub."""
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
    """The JSON of a line, None where it has another checksum."""
    checksum, _, text = line.partition(b" ")
    return text if xxh3_of(text).encode() == checksum else None


def _fingerprint(line: bytes) -> dict[str, Any] | None:
    """The fingerprint in the first line, None if the line is damaged."""
    try:
        value = parse(_checked(line) or b"", JOURNAL_NAME, error=ValueError)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else text[:297] + "..."
