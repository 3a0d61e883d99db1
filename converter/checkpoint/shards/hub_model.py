"""A checkpoint in a Hub repository, pinned to a commit for the whole conversion."""

import threading
from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.shards.shard_index import MAX_INDEX_BYTES
from converter.checkpoint.shards.source_kinds import SHARD_INDEX_NAME, check_names
from converter.journal.journal_file import Pin, read_pin
from formats.config.generation_config import GENERATION_NAME
from formats.config.side_files import MAX_BYTES, MAX_FILES, is_side_file
from formats.errors import SourceError
from formats.hub.ranges import Retries
from formats.hub.repo import HubRepo
from formats.hub.repo_files import MAX_SMALL_BYTES

_MAX_TOTAL_BYTES = 1 << 30
"""Upper bound of all small files together."""
_MAX_BYTES = {
    "config.json": MAX_SMALL_BYTES,
    GENERATION_NAME: MAX_SMALL_BYTES,
    SHARD_INDEX_NAME: MAX_INDEX_BYTES,
}
_CARD_NAME = "README.md"
"""The model card names the licence."""
_HINT = "name the repository of an ordinary checkpoint"


@dataclass(frozen=True)
class HubModel:
    """A model in a repository at one commit.

    folder: the commit's folder in the user's cache, with the small files. asked: the revision that
    the user named. stop: once set, waits between attempts end. keep: keep shards on disk while they
    are needed; else they are read by ranges and not compared with their hashes. max_disk_bytes:
    limit of these shards, None for the default.
    """

    repo: HubRepo
    folder: Path
    asked: str | None
    stop: threading.Event
    keep: bool = True
    max_disk_bytes: int | None = None

    @classmethod
    def open(
        cls,
        name: str,
        revision: str | None = None,
        token: str | None = None,
        *,
        keep: bool = True,
        max_disk_bytes: int | None = None,
        resume: Path | None = None,
    ) -> "HubModel":
        """Resolve the revision to a commit, and fetch the small files into the user's cache.

        resume: folder of an unfinished conversion; the commit of its journal is used if repository
        and revision are the same. Raises HubError, SourceError.
        """
        stop = threading.Event()
        pin = read_pin(resume) if resume else None
        commit = pin.commit if pin and (pin.repo, pin.asked) == (name, revision) else revision
        repo = HubRepo.open(name, commit, token, Retries(wait=stop.wait))
        return cls(repo, _small_files(repo), revision, stop, keep, max_disk_bytes)

    @property
    def pin(self) -> Pin:
        """The commit as a journal records it, for a resume."""
        return Pin(self.repo.repo, self.asked, self.repo.commit)


def _small_files(repo: HubRepo) -> Path:
    """Fetch all files but the shards that a conversion reads; return their folder in the cache."""
    where = f"{repo.repo}@{repo.commit[:12]}"
    check_names(repo.files, repo.repo, where)
    # The name of a side file has no character with a meaning in a pattern.
    patterns = ["config.json", SHARD_INDEX_NAME, *filter(is_side_file, repo.files)]
    if _CARD_NAME in repo.files and repo.files[_CARD_NAME].size <= MAX_SMALL_BYTES:
        patterns.append(_CARD_NAME)
    if "config.json" not in repo.files:
        raise SourceError(f"{where}: file config.json is missing", "name the repository of a model")
    files = repo.matching(patterns)
    for file in files:
        max_bytes = _MAX_BYTES.get(file.name, MAX_BYTES)
        if file.size > max_bytes:
            raise SourceError(f"{file} has {file.size} bytes, the limit is {max_bytes}", _HINT)
    total_bytes = sum(file.size for file in files)
    if total_bytes > _MAX_TOTAL_BYTES or len(files) > MAX_FILES:
        raise SourceError(
            f"{repo.repo}: {len(files)} tokenizer, licence and other small files of {total_bytes}"
            f" bytes; allowed are {MAX_FILES} of {_MAX_TOTAL_BYTES}",
            _HINT,
        )
    return repo.snapshot(patterns)
