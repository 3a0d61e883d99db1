"""The interface of a source of shards, and the one for a local folder."""

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from converter.journal.keys import UnitKey
from formats.errors import SourceError
from formats.files.io_errors import translated
from formats.files.paths import check_no_pointer, locate_source, open_regular
from formats.safetensors_header import Header, read_header

_SAMPLES = 64
_SAMPLE_BYTES = 4096
_READ_BYTES = 4 << 20


class Stopped(Exception):
    """The conversion is being stopped; the work is given up."""


@dataclass(frozen=True)
class ShardNeed:
    """The names of the shards that a unit of work reads."""

    key: UnitKey
    shards: frozenset[str]


class Shards(ABC):
    """A checkpoint's shards by name; several threads may read at once. Close it.

    where: the checkpoint, for messages. stop: once set, reads that would wait raise Stopped.
    """

    where: str
    stop: threading.Event

    def __init__(self) -> None:
        self.stop = threading.Event()

    @abstractmethod
    def open(self, name: str) -> None:
        """Open a shard, before any other call about it. Raises PathError, DamageError."""

    @abstractmethod
    def header(self, name: str, max_bytes: int) -> Header:
        """Return the shard's header. Raises FormatError, DamageError."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the shard's size in bytes."""

    @abstractmethod
    def read_into(self, name: str, offset: int, view: memoryview) -> int:
        """Fill `view` from byte `offset` on; return the number of bytes read.

        It is less than the length of `view` only at the shard's end.
        """

    @abstractmethod
    def sha256(self, name: str, stop: threading.Event | None) -> str:
        """Return the sha256 of the whole shard in hex; worthless once `stop` is set."""

    @abstractmethod
    def identity(self, name: str, header: Header) -> str:
        """Return a cheap text that differs for the same shard of another model."""

    def expect(self, needs: Iterable[ShardNeed]) -> None:
        """Announce the shards of the work to come, in its order."""
        return None

    def done(self, key: UnitKey) -> None:
        """Report that an expected unit of work is done."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Close files and end threads."""


class FolderShards(Shards):
    """Shards in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.where = str(folder)
        self._folder = folder
        self._descriptors: dict[str, int] = {}

    def open(self, name: str) -> None:
        self._descriptors[name] = open_regular(locate_source(self._folder, name, self.where))

    def header(self, name: str, max_bytes: int) -> Header:
        with self._reading(name):
            check_no_pointer(os.pread(self._descriptors[name], 64, 0), self._folder / name)
            return read_header(self._descriptors[name], str(self._folder / name), max_bytes)

    def size(self, name: str) -> int:
        with self._reading(name):
            return os.fstat(self._descriptors[name]).st_size

    def read_into(self, name: str, offset: int, view: memoryview) -> int:
        with self._reading(name):
            return pread_into(self._descriptors[name], offset, view)

    def sha256(self, name: str, stop: threading.Event | None) -> str:
        with self._reading(name):
            return descriptor_sha256(self._descriptors[name], stop)

    def identity(self, name: str, header: Header) -> str:
        """Return a hash of the size, the header, and samples of the data."""
        descriptor = self._descriptors[name]
        size = self.size(name)
        digest = hashlib.sha256(f"{size} {header.sha256}".encode())
        with self._reading(name):
            for i in range(_SAMPLES):
                digest.update(os.pread(descriptor, _SAMPLE_BYTES, size * i // _SAMPLES))
        return digest.hexdigest()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _reading(self, name: str) -> AbstractContextManager[None]:
        return translated(self._folder / name, "read", SourceError)


def pread_into(descriptor: int, offset: int, view: memoryview) -> int:
    """Fill `view` from an open file; return the number of bytes read."""
    done = 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done


def descriptor_sha256(descriptor: int, stop: threading.Event | None = None) -> str:
    """Return the sha256 of an open file in hex; worthless once `stop` is set."""
    digest = hashlib.sha256()
    position = 0
    while (chunk := os.pread(descriptor, _READ_BYTES, position)) and not (stop and stop.is_set()):
        digest.update(chunk)
        position += len(chunk)
    return digest.hexdigest()


def cut_off(where: str, name: str, tensor: str) -> SourceError:
    """Return the error of a shard that ends inside a tensor."""
    return SourceError(f"{where}/{name}: cut off inside tensor {tensor}", "get the shard again")
