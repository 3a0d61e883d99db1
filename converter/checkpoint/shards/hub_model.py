"""A checkpoint in a Hub repository, pinned to a commit for the whole conversion."""

import threading
from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.shards.source_kinds import INDEX_NAME, check_names
from converter.journal.journal_file import Pin, read_pin
from formats.config.generation_config import GENERATION_NAME
from formats.config.side_files import MAX_BYTES, MAX_FILES, is_side_file
from formats.errors import SourceError
from formats.hub.ranges import Retries
from formats.hub.repo import HubRepo
from formats.hub.repo_files import MAX_SMALL_BYTES

_MAX_SMALL_BYTES = 1 << 30
_LIMITS = {"config.json": MAX_SMALL_BYTES, GENERATION_NAME: MAX_SMALL_BYTES, INDEX_NAME: 64 << 20}
_HINT = "name the repository of an ordinary checkpoint"


@dataclass(frozen=True)
class HubModel:
    """A model in a repository. `folder` has its small files: the cache's folder of the commit."""

    repo: HubRepo
    folder: Path
    asked: str | None
    """The revision that the user named."""
    stop: threading.Event
    """Once set, waits between attempts end."""
    keep: bool = True
    """Whether shards are kept on disk while they are needed; else they are read by ranges, and
    cannot be hashed.
    """
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
        """Resolves the revision, or takes the commit at which an unfinished conversion in folder
        `resume` was begun.

        Fetches config, tokenizer, licence and the like into the user's cache. Raises HubError,
        SourceError.
        """
        stop = threading.Event()
        pin = read_pin(resume) if resume else None
        commit = pin.commit if pin and (pin.repo, pin.asked) == (name, revision) else revision
        repo = HubRepo.open(name, commit, token, Retries(wait=stop.wait))
        return cls(repo, _small_files(repo), revision, stop, keep, max_disk_bytes)

    @property
    def pin(self) -> Pin:
        """What a journal records, by which a resume finds the same commit."""
        return Pin(self.repo.repo, self.asked, self.repo.commit)


def _small_files(repo: HubRepo) -> Path:
    """The cache's folder of the commit, with everything in it that a conversion reads besides the
    shards.
    """
    check_names(repo.files, repo.repo, f"{repo.repo}@{repo.commit[:12]}")
    # Names of side files have no character that means something in a pattern.
    patterns = ["config.json", INDEX_NAME, *filter(is_side_file, repo.files)]
    if "config.json" not in repo.files:
        raise SourceError(
            f"{repo.repo}@{repo.commit[:12]}: file config.json is missing",
            "name a model's repository",
        )
    files = repo.matching(patterns)
    for file in files:
        if file.size > (limit := _LIMITS.get(file.name, MAX_BYTES)):
            raise SourceError(f"{file} has {file.size} bytes, allowed are {limit}", _HINT)
    if (size := sum(file.size for file in files)) > _MAX_SMALL_BYTES or len(files) > MAX_FILES:
        found = f"{len(files)} tokenizer, licence and other small files of {size} bytes"
        raise SourceError(
            f"{repo.repo}: {found}; allowed are {MAX_FILES} of {_MAX_SMALL_BYTES}", _HINT
        )
    return repo.snapshot(patterns)
