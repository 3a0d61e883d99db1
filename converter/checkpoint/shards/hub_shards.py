"""The shards of a checkpoint in a Hub repository: cached, fetched, or read by ranges."""

import hashlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from converter.checkpoint.shards.fetched_shards import FetchedShards
from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.shards.shard_source import (
    ShardNeed,
    Shards,
    descriptor_sha256,
    pread_into,
)
from converter.journal.keys import UnitKey
from formats.errors import SourceError
from formats.files.io_errors import translated
from formats.files.paths import open_regular
from formats.hub.remote_header import fetch_header
from formats.safetensors_header import Header, read_header

_HEADER_BYTES = 64 << 10
_SHARDS_ON_DISK = 4


class HubShards(Shards):
    """The shards of a `HubModel`; those in the user's cache are used there and never deleted."""

    def __init__(self, model: HubModel) -> None:
        self.stop = model.stop
        self.where = f"{model.repo.repo}@{model.repo.commit[:12]}"
        self._model = model
        self._repo = model.repo
        self._cached: dict[str, int] = {}
        self._paths: dict[str, Path] = {}
        self._names: list[str] = []
        self._fetched: FetchedShards | None = None

    def open(self, name: str) -> None:
        if name not in self._repo.files:
            hint = "the repository is not complete"
            if self._repo.offline:
                hint = "go online: HF_HUB_OFFLINE is set"
            raise SourceError(f"{self.where}: file {name} is missing", hint)
        if path := self._repo.cached(name):
            self._paths[name] = path
            self._cached[name] = open_regular(path)
        self._names.append(name)

    def header(self, name: str, max_bytes: int) -> Header:
        if name in self._cached:
            with translated(self._paths[name], "read", SourceError):
                return read_header(self._cached[name], f"{self.where}: {name}", max_bytes)
        return fetch_header(self._repo, name, max_bytes, first_bytes=_HEADER_BYTES)[0]

    def size(self, name: str) -> int:
        return self._repo.file(name).size

    def read_into(self, name: str, offset: int, view: memoryview) -> int:
        if name in self._cached:
            with translated(self._paths[name], "read", SourceError):
                return pread_into(self._cached[name], offset, view)
        if self._fetched:
            with (
                self._fetched.hold(name) as descriptor,
                translated(f"{self.where}: {name}", "read", SourceError),
            ):
                return pread_into(descriptor, offset, view)
        self._repo.read_into(name, offset, view)
        return len(view)

    def sha256(self, name: str, stop: threading.Event | None) -> str:
        """Return the Hub's sha256, with which fetched bytes are compared; a cached file is hashed.

        SourceError if the cached file has another hash.
        """
        file = self._repo.file(name)
        if name not in self._cached:
            return file.sha256 or self._hash_remote(name)
        with translated(self._paths[name], "read", SourceError):
            sha256 = descriptor_sha256(self._cached[name], stop)
        is_stopped = stop is not None and stop.is_set()
        if file.sha256 and sha256 != file.sha256 and not is_stopped:
            raise SourceError(
                f"{self._paths[name]}: the cache is damaged: sha256 {sha256}, the Hub says"
                f" {file.sha256}",
                f"delete {os.path.realpath(self._paths[name])}, and run the same command again",
            )
        return sha256

    def identity(self, name: str, header: Header) -> str:
        return f"{self.size(name)} {self._repo.file(name).etag}"

    def disk_bytes(self) -> int:
        """Return the limit of fetched shards on disk; by default the largest four fit."""
        if not self._model.keep:
            return 0
        if self._model.max_disk_bytes is not None:
            return self._model.max_disk_bytes
        sizes = (self.size(name) for name in self._names if name not in self._cached)
        return sum(sorted(sizes, reverse=True)[:_SHARDS_ON_DISK])

    def fetch_into(self, folder: Path) -> None:
        """Keep shards in `folder` from now on, while they are needed, if the model asks for it."""
        if self._model.keep:
            self._fetched = FetchedShards(self._repo, folder, self.disk_bytes(), self.stop)

    def expect(self, needs: Iterable[ShardNeed]) -> None:
        if self._fetched:
            self._fetched.expect(
                ShardNeed(need.key, need.shards - self._cached.keys()) for need in needs
            )

    def done(self, key: UnitKey) -> None:
        if self._fetched:
            self._fetched.done(key)

    def close(self) -> None:
        if self._fetched:
            self._fetched.close()
        for descriptor in self._cached.values():
            os.close(descriptor)
        self._cached.clear()

    def _hash_remote(self, name: str) -> str:
        """Return the sha256 of a shard outside LFS, for which the Hub has none."""
        digest = hashlib.sha256()
        for chunk in self._repo.chunks(name, 0, self.size(name)):
            digest.update(chunk)
        return digest.hexdigest()
