"""A model from the Hub of which a part is there: a folder in the artifact's layout, and a record of
its experts.

Until all experts are there the index has another name, so that nobody takes the holes for weights.
Afterwards it is an ordinary converted folder.
"""

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from formats import INDEX_NAME, PENDING_NAME
from formats.artifact import Artifact
from formats.config.recorded_config import CONFIG_NAME
from formats.errors import DoesNotFitError, HubError
from formats.files.file_lock import lock_file
from formats.files.io_errors import translated
from formats.files.output_file import OutputFile, make_folders, remove, rename
from formats.hub.ranges import Retries
from formats.hub.remote_artifact import open_remote
from formats.hub.repo import HubRepo, is_offline, kept_root
from formats.hub.repo_files import fetch_file, read_small_file
from formats.index import Index
from formats.reading.whole_files import RUN_TIME_FILES
from formats.writer import write_file

RECORD_NAME = ".moe-convert.fetched"
"""One byte for each expert, by layer: 1 once its bytes are there, durably and with the index's
sha256.
"""
_UNCHECKED_NAME = "moe_index.json.unchecked"

Progress = Callable[[str, int, int], None]
"""Called with (stage, done bytes, total bytes)."""


@dataclass
class LazyFolder:
    """A repository's model at one commit, in `kept_root`. repo: None offline."""

    path: Path
    artifact: Artifact
    repo: HubRepo | None
    stop: threading.Event
    """Once set, waits between attempts end."""
    _record: bytearray
    _file: OutputFile | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls, name: str, revision: str | None = None, token: str | None = None, *, progress: Progress | None = None,
        retries: Retries | None = None,
    ) -> "LazyFolder":  # fmt: skip
        """Fetches index, headers, trunk and tokenizer of repository `name`, unless they are there.

        Raises HubError, DamageError where something has another hash, DoesNotFitError where the
        disk has no room for the whole model, and what Artifact.open raises.
        """
        stop = threading.Event()
        root = kept_root() / name.replace("/", "--")
        repo = (
            None
            if is_offline()
            else HubRepo.open(name, revision, token, retries or Retries(wait=stop.wait))
        )
        commit = _commit(root, name, revision, repo)
        path = root / commit
        with _locked(root, commit):
            if repo and not any((path / index).exists() for index in (INDEX_NAME, PENDING_NAME)):
                _prepare(path, repo, progress or (lambda stage, done, total: None))
            complete = (path / INDEX_NAME).exists()
            artifact = Artifact.open(path, INDEX_NAME if complete else PENDING_NAME)
            return cls(path, artifact, repo, stop, _read_record(path, artifact, complete))

    @property
    def complete(self) -> bool:
        """Whether every expert is there."""
        return all(self._record)

    def has(self, layer: int, expert: int) -> bool:
        """Whether the expert's bytes are there and were compared with the index."""
        return bool(self._record[self._place(layer, expert)])

    def record(self, experts: Iterable[tuple[int, int]]) -> None:
        """These experts (layer, expert), whose bytes were compared and are durable, are there. The
        last one makes an ordinary converted folder.
        """
        with self._lock:
            if self._file is None:
                self._file = OutputFile(self.path / RECORD_NAME, keep=True)
            for layer, expert in experts:
                place = self._place(layer, expert)
                self._file.write_at(b"\1", place)
                self._record[place] = 1
            self._file.sync()
            if self.complete:
                self._finish()

    def start_anew(self) -> None:
        """For a forked child: its locks may be held by threads that are not there."""
        self._lock = threading.Lock()
        # The same object: attempts of `repo` wait by it.
        self.stop.__init__()  # type: ignore[misc]

    def close(self) -> None:
        """Gives up the record's file."""
        with self._lock:
            if self._file:
                self._file.close()
            self._file = None

    def _place(self, layer: int, expert: int) -> int:
        return layer * self.artifact.architecture.num_local_experts + expert

    def _finish(self) -> None:
        with _locked(self.path.parent, self.path.name):
            # Another process may have been quicker.
            if (self.path / PENDING_NAME).exists():
                rename(self.path / PENDING_NAME, self.path / INDEX_NAME)
            remove(self.path / RECORD_NAME)


def _commit(root: Path, name: str, revision: str | None, repo: HubRepo | None) -> str:
    """The repository's commit; offline the one that the revision meant when it was last looked up."""
    ref = root / "refs" / quote(revision or "main", safe="")
    if repo:
        make_folders(ref.parent)
        write_file(ref, repo.commit.encode())
        return repo.commit
    commit = ref.read_text() if ref.is_file() else revision or ""
    if not re.fullmatch("[0-9a-f]{40}", commit) or not (root / commit).is_dir():
        raise HubError(
            f"{name}: offline (HF_HUB_OFFLINE), and nothing of it is in {root}", "go online"
        )
    return commit


def _prepare(path: Path, repo: HubRepo, progress: Progress) -> None:
    """Everything but experts; at the end the index appears under PENDING_NAME."""
    artifact = open_remote(repo, path, _UNCHECKED_NAME)
    index = artifact.index
    _check_room(path, index)
    for file in index.files:
        if file.file not in RUN_TIME_FILES:
            fetch_file(repo, file.file, file.sha256, path / file.file, lambda done, total: None)
        elif file.file != CONFIG_NAME and file.file in repo.files:
            # The publisher may have changed it; config.json is there already.
            write_file(path / file.file, read_small_file(repo, file.file))
    fetch_file(
        repo, index.trunk.file, index.trunk.sha256, path / index.trunk.file,
        lambda done, total: progress("fetching all but experts", done, total),
    )  # fmt: skip
    remove(path / RECORD_NAME)
    rename(path / _UNCHECKED_NAME, path / PENDING_NAME)


def _check_room(path: Path, index: Index) -> None:
    needed = index.trunk.size_bytes + sum(layer.size_bytes for layer in index.layers)
    with translated(path, "used"):
        free = shutil.disk_usage(path).free
    if needed > free:
        raise DoesNotFitError(
            f"{path}: the whole model takes {needed} bytes, free are {free}",
            "free some space, or set HF_HOME",
        )


def _read_record(path: Path, artifact: Artifact, complete: bool) -> bytearray:
    count = artifact.architecture.expert_layers * artifact.architecture.num_local_experts
    if complete:
        return bytearray(b"\1" * count)
    data = (path / RECORD_NAME).read_bytes() if (path / RECORD_NAME).is_file() else b""
    return bytearray(byte == 1 for byte in data[:count].ljust(count, b"\0"))


@contextlib.contextmanager
def _locked(root: Path, commit: str) -> Iterator[None]:
    """One process at a time."""
    make_folders(root)
    with OutputFile(root / f".{commit}.lock", keep=True) as lock:
        lock_file(lock.fileno(), lock.path, wait=True)
        yield
