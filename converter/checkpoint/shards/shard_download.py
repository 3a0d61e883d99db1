"""Downloads one shard of a Hub repository and verifies it."""

import logging
from collections.abc import Callable
from pathlib import Path

from formats.errors import SourceError
from formats.files.output_file import OutputFile, remove, rename
from formats.hub.repo import HubRepo

_READ_BYTES = 4 << 20

_log = logging.getLogger(__name__)


def fetch_shard(repo: HubRepo, name: str, path: Path, check_stop: Callable[[], None]) -> None:
    """Fetch shard `name` to `path`, which appears only once it has the Hub's hash.

    Completes a partial download. check_stop: called between pieces; raises to give up. SourceError
    if two downloads have another hash; HubError.
    """
    file = repo.file(name)
    partial = path.with_suffix(".partial")
    for _ in range(2):
        _log.info("fetching %s (%d bytes)", name, file.size)
        if _fetch(repo, name, partial, check_stop) == file.etag:
            rename(partial, path)
            return
        remove(partial)
        _log.warning("%s: its hash differs from the Hub's; fetching it again", file)
    raise SourceError(
        f"{file}: was fetched twice, and its hash is not {file.etag}, as the Hub says",
        "the line or a proxy damages it, or the Hub is a faulty mirror: use another one"
        " (HF_ENDPOINT)",
    )


def _fetch(repo: HubRepo, name: str, partial: Path, check_stop: Callable[[], None]) -> str:
    """Complete the partial file; return its hash."""
    file = repo.file(name)
    hasher = file.hasher()
    with OutputFile(partial, keep=True) as f:
        end = 0
        while chunk := f.read_at(_READ_BYTES, end):
            hasher.update(chunk)
            end += len(chunk)
            check_stop()
        if end < file.size:
            for chunk in repo.chunks(name, end, file.size):
                f.write_at(chunk, end)
                hasher.update(chunk)
                end += len(chunk)
                check_stop()
        f.sync()
    return str(hasher.hexdigest())
