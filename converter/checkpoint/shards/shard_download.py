"""Downloads one shard of a Hub repository and verifies it."""

import logging
from collections.abc import Callable
from pathlib import Path

from formats.errors import SourceError
from formats.hub.download import download_file
from formats.hub.repo import HubRepo

_log = logging.getLogger(__name__)


def fetch_shard(repo: HubRepo, name: str, path: Path, check_stop: Callable[[], None]) -> None:
    """Fetch shard `name` to `path`, which appears only once it has the Hub's hash.

    Completes a partial download. check_stop: called between pieces; raises to give up. SourceError
    if two downloads have another hash; HubError.
    """
    file = repo.file(name)
    _log.info("fetching %s (%d bytes)", name, file.size)
    digest = download_file(
        repo,
        name,
        path,
        hasher=file.hasher,
        expected=file.etag,
        advance=lambda done: check_stop(),
    )
    if digest != file.etag:
        raise SourceError(
            f"{file}: was fetched twice, and its hash is not {file.etag}, as the Hub says",
            "the line or a proxy damages it, or the Hub is a faulty mirror: use another one"
            " (HF_ENDPOINT)",
        )
