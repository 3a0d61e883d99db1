"""A model of a disk after a power loss: the calls that must have taken effect, and those that may
have.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from faults.campaigns.call_log import Call

BLOCK_BYTES = 4096


@dataclass
class File:
    """A file: its bytes as programs see them, its durable bytes, and the calls between the two."""

    now: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class NameChange:
    """A name added to a folder or removed from it; a rename removes the old name.

    file: None for a folder.
    """

    come: str = ""
    file: File | None = None
    gone: str = ""


Names = dict[str, File | None]
"""Paths of files, and of folders (None)."""


class Disk:
    """A disk that takes calls in order and returns the possible states after a power loss.

    Strict POSIX: a file's bytes are durable after its fsync, names after their folder's. Any other
    change may have reached the disk.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        """The folder that everything is in; it is there itself."""
        self._names: Names = {}
        self._durable: Names = {}
        self._pending: dict[str, list[NameChange]] = {}

    def take(self, call: Call) -> None:
        """Makes a call."""
        path = call.path
        file = self._names.get(path)
        if call.function == "mkdir":
            self._change(path, NameChange(come=path))
        elif call.function == "create" and call.number & os.O_TMPFILE == os.O_TMPFILE:
            return
        elif call.function == "create":
            if file is None:
                file = File()
                self._change(path, NameChange(come=path, file=file))
            if call.number & os.O_TRUNC:
                self._write(file, Call("truncate", 0, path, "", b""))
        elif call.function == "rename":
            self._change(path, NameChange(come=path, file=self._names[call.old], gone=call.old))
        elif call.function in ("unlink", "rmdir"):
            self._change(path, NameChange(gone=path))
        elif call.function == "fsync_folder":
            for change in self._pending.pop(path, []):
                _apply(change, self._durable)
        elif call.function == "fsync" and file:
            file.durable, file.pending = bytes(file.now), []
        elif file:
            self._write(file, call)

    def lost(self) -> dict[str, bytes | None]:
        """Return the state with durable changes only."""
        return self._state(lambda changes: [], lambda file: file.durable)

    def kept(self) -> dict[str, bytes | None]:
        """Return the state with all changes."""
        return self._state(lambda changes: changes, lambda file: bytes(file.now))

    def names_only(self) -> dict[str, bytes | None]:
        """Return the state with all names and sizes; bytes without fsync are zeros."""

        def sized(file: File) -> bytes:
            return file.durable[: len(file.now)].ljust(len(file.now), b"\0")

        return self._state(lambda changes: changes, sized)

    def prefix(self, state: random.Random) -> dict[str, bytes | None]:
        """Return a state with the first changes of names in each folder and the first calls of each
        file.
        """
        return self._state(
            lambda changes: changes[: state.randint(0, len(changes))],
            lambda file: _replay(
                file, file.pending[: state.randint(0, len(file.pending))], lambda: True
            ),
        )

    def subset(self, state: random.Random) -> dict[str, bytes | None]:
        """Return a state with a random subset of the changes of names and of the written blocks."""
        return self._state(
            lambda changes: [change for change in changes if state.random() < 0.5],
            lambda file: _replay(file, file.pending, lambda: state.random() < 0.5),
        )

    def _change(self, path: str, change: NameChange) -> None:
        _apply(change, self._names)
        self._pending.setdefault(str(PurePath(path).parent), []).append(change)

    def _write(self, file: File, call: Call) -> None:
        _do(file.now, call, lambda: True)
        file.pending.append(call)

    def _state(
        self,
        chosen: Callable[[list[NameChange]], list[NameChange]],
        bytes_of: Callable[[File], bytes],
    ) -> dict[str, bytes | None]:
        names = dict(self._durable)
        for changes in self._pending.values():
            for change in chosen(changes):
                _apply(change, names)
        return {
            path: None if file is None else bytes_of(file)
            for path, file in names.items()
            if self._has_folders(path, names)
        }

    def _has_folders(self, path: str, names: Names) -> bool:
        """True if all folders that a path leads through are there."""
        parents = [str(parent) for parent in PurePath(path).parents]
        return all(parent in names for parent in parents[: parents.index(self.root)])


def build(state: dict[str, bytes | None], root: str, folder: Path) -> None:
    """Writes a state to `folder`, in place of the model's root."""
    for path, data in sorted(state.items()):
        place = folder / PurePath(path).relative_to(root)
        if data is None:
            place.mkdir()
        else:
            place.write_bytes(data)


def _apply(change: NameChange, names: Names) -> None:
    if change.gone:
        names.pop(change.gone, None)
    if change.come:
        names[change.come] = change.file


def _replay(file: File, calls: list[Call], reaches_disk: Callable[[], bool]) -> bytes:
    data = bytearray(file.durable)
    for call in calls:
        _do(data, call, reaches_disk)
    return bytes(data)


def _do(data: bytearray, call: Call, reaches_disk: Callable[[], bool]) -> None:
    """Apply a call to a file's bytes; `reaches_disk` decides, for each block of a write."""
    if call.function == "truncate":
        if reaches_disk():
            size = call.number
            data[:] = data[:size].ljust(size, b"\0")
    elif call.function == "allocate":
        data.extend(bytes(max(0, call.number - len(data))))
    else:
        for begin in range(0, len(call.data), BLOCK_BYTES):
            block, at = call.data[begin : begin + BLOCK_BYTES], call.number + begin
            if reaches_disk():
                data.extend(bytes(max(0, at - len(data))))
                data[at : at + len(block)] = block
