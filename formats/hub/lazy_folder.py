"""A partly downloaded model: a folder in the artifact's layout, and a record of its experts.

Until the last expert is there, the index has another name, so that no program reads the holes as
weights. Then the folder becomes an ordinary converted folder.
"""

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from formats import INDEX_NAME, PENDING_NAME
from formats.artifact import Artifact
from formats.config.recorded_config import CONFIG_NAME
from formats.errors import DoesNotFitError, HubError
from formats.files.disk_space import free_disk_bytes
from formats.files.file_lock import lock_file
from formats.files.output_file import OutputFile, make_folders, remove, rename
from formats.files.partial_file import write_file
from formats.hub.hub_settings import is_offline, kept_root
from formats.hub.ranges import Retries
from formats.hub.remote_artifact import open_remote
from formats.hub.repo import HubRepo
from formats.hub.repo_files import fetch_file, read_small_file
from formats.hub.repo_listing import cached_folder
from formats.index import Index
from formats.progress import Progress, no_progress
from formats.reading.whole_files import RUN_TIME_FILES

RECORD_NAME = ".moe-convert.fetched"
"""The record: one byte for each expert, layer by layer.

1: its bytes are durable and have the index's sha256.
"""
_UNCHECKED_NAME = "moe_index.json.unchecked"


@dataclass
class LazyFolder:
    """A repository's model at one commit, in `kept_root`. repo: None when offline."""

    path: Path
    artifact: Artifact
    repo: HubRepo | None
    stop: threading.Event
    """Set it to end waits between attempts."""
    _record: bytearray
    _file: OutputFile | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls,
        name: str,
        revision: str | None = None,
        token: str | None = None,
        *,
        progress: Progress = no_progress,
        retries: Retries | None = None,
    ) -> "LazyFolder":
        """Open the folder of repository `name`; download index, headers, trunk and tokenizer first.

        If huggingface_hub's cache holds the whole model, its folder is used, and nothing is
        written.

        Raises HubError, DamageError for a wrong hash, DoesNotFitError if the disk has no space for
        the whole model, and the errors of Artifact.open.
        """
        stop = threading.Event()
        root = kept_root() / name.replace("/", "--")
        repo = (
            None
            if is_offline()
            else HubRepo.open(name, revision, token, retries or Retries(wait=stop.wait))
        )
        if cached := _in_hub_cache(name, revision, repo):
            artifact = Artifact.open(cached)
            return cls(cached, artifact, repo, stop, _read_record(cached, artifact, complete=True))
        commit = _commit(root, name, revision, repo)
        path = root / commit
        with _locked(root, commit):
            if repo and not any((path / index).exists() for index in (INDEX_NAME, PENDING_NAME)):
                _prepare(path, repo, progress)
            complete = (path / INDEX_NAME).exists()
            artifact = Artifact.open(path, INDEX_NAME if complete else PENDING_NAME)
            return cls(path, artifact, repo, stop, _read_record(path, artifact, complete))

    @property
    def complete(self) -> bool:
        """True if every expert is there."""
        return all(self._record)

    def has(self, layer: int, expert: int) -> bool:
        """True if the expert's bytes are there and match the index."""
        return bool(self._record[self._position(layer, expert)])

    def record(self, experts: Iterable[tuple[int, int]]) -> None:
        """Record experts (layer, expert) whose bytes are durable and match the index.

        The last expert completes the folder: it becomes an ordinary converted folder.
        """
        with self._lock:
            if self._file is None:
                self._file = OutputFile(self.path / RECORD_NAME, keep=True)
            for layer, expert in experts:
                position = self._position(layer, expert)
                self._file.write_at(b"\1", position)
                self._record[position] = 1
            self._file.sync()
            if self.complete:
                self._finish()

    def start_anew(self) -> None:
        """Prepare for use in a forked child: threads that it lacks may hold the locks."""
        self._lock = threading.Lock()
        # The same object: the waits of `repo` use it.
        self.stop.__init__()  # type: ignore[misc]

    def close(self) -> None:
        """Close the record's file."""
        with self._lock:
            if self._file:
                self._file.close()
            self._file = None

    def _position(self, layer: int, expert: int) -> int:
        return layer * self.artifact.architecture.num_local_experts + expert

    def _finish(self) -> None:
        with _locked(self.path.parent, self.path.name):
            # Another process may have renamed it first.
            if (self.path / PENDING_NAME).exists():
                rename(self.path / PENDING_NAME, self.path / INDEX_NAME)
            remove(self.path / RECORD_NAME)


def _in_hub_cache(name: str, revision: str | None, repo: HubRepo | None) -> Path | None:
    """Return the model's folder in huggingface_hub's cache if the model is complete there."""
    try:
        # Offline, opening a repository finds only what is in the cache.
        return cached_folder(repo or HubRepo.open(name, revision))
    except HubError:
        if repo is not None:
            raise
        return None


def _commit(root: Path, name: str, revision: str | None, repo: HubRepo | None) -> str:
    """Return the repository's commit; offline, the commit of the last lookup of `revision`."""
    ref = root / "refs" / quote(revision or "main", safe="")
    if repo:
        make_folders(ref.parent)
        write_file(ref, repo.commit.encode())
        return repo.commit
    commit = ref.read_text() if ref.is_file() else revision or ""
    if not re.fullmatch("[0-9a-f]{40}", commit) or not (root / commit).is_dir():
        raise HubError(
            f"{name}: offline (HF_HUB_OFFLINE), and {root} has no files of it", "go online"
        )
    return commit


def _prepare(path: Path, repo: HubRepo, progress: Progress) -> None:
    """Download everything but experts; the index appears last, as PENDING_NAME."""
    artifact = open_remote(repo, path, _UNCHECKED_NAME)
    index = artifact.index
    _check_space(path, index)
    for file in index.files:
        if file.file not in RUN_TIME_FILES:
            fetch_file(repo, file.file, file.sha256, path / file.file)
        elif file.file != CONFIG_NAME and file.file in repo.files:
            # The publisher may edit it: the index's sha256 doesn't apply. config.json, the other
            # file of this kind, comes with the index.
            write_file(path / file.file, read_small_file(repo, file.file))
    fetch_file(
        repo,
        index.trunk.file,
        index.trunk.sha256,
        path / index.trunk.file,
        progress,
        stage="fetching all but experts",
    )
    remove(path / RECORD_NAME)
    rename(path / _UNCHECKED_NAME, path / PENDING_NAME)


def _check_space(path: Path, index: Index) -> None:
    needed = index.weight_bytes
    free = free_disk_bytes(path)
    if needed > free:
        raise DoesNotFitError(
            f"{path}: the whole model takes {needed} bytes, only {free} are free",
            "free space, or set HF_HOME to a folder on another disk",
        )


def _read_record(path: Path, artifact: Artifact, complete: bool) -> bytearray:
    count = artifact.architecture.expert_layers * artifact.architecture.num_local_experts
    if complete:
        return bytearray(b"\1" * count)
    data = (path / RECORD_NAME).read_bytes() if (path / RECORD_NAME).is_file() else b""
    return bytearray(byte == 1 for byte in data[:count].ljust(count, b"\0"))


@contextlib.contextmanager
def _locked(root: Path, commit: str) -> Iterator[None]:
    """Lock out other processes during the block."""
    make_folders(root)
    with OutputFile(root / f".{commit}.lock", keep=True) as lock:
        lock_file(lock.fileno(), lock.path, wait=True)
        yield
