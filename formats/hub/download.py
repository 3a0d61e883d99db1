"""Download of a whole file: resumed after an interruption, checked before it gets its name."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from formats.errors import HubError
from formats.files.io_errors import translated
from formats.files.output_file import OutputFile, remove
from formats.files.partial_file import partial_path
from formats.hub.repo import HubRepo

_CHUNK_BYTES = 4 << 20
_ATTEMPTS = 2

_log = logging.getLogger(__name__)


def download_file(
    repo: HubRepo,
    name: str,
    path: Path,
    *,
    hasher: Callable[[], Any],
    expected: str,
    advance: Callable[[int], None],
) -> str:
    """Download a file of `repo` to `path`, and return the hex digest of its bytes.

    The file gets the name `path` only if the digest is `expected`. Otherwise one more attempt
    starts from nothing; after it, the wrong digest is returned and no file remains.

    hasher: returns a new hash object. advance: called with the bytes there after each chunk, those
    of an earlier download included; its exception ends the download and keeps the partial file.
    Raises HubError, OutputError, DoesNotFitError.
    """
    size_bytes = repo.file(name).size
    partial = partial_path(path)
    digest = ""
    for attempt in range(1, _ATTEMPTS + 1):
        hashed = hasher()
        with OutputFile(partial, keep=True) as out:
            if out.size_bytes > size_bytes:
                out.truncate(0)
            end = 0
            while chunk := out.read_at(_CHUNK_BYTES, end):
                hashed.update(chunk)
                end += len(chunk)
                advance(end)
            for chunk in _chunks(repo, name, end, size_bytes):
                out.write_at(chunk, end)
                hashed.update(chunk)
                end += len(chunk)
                advance(end)
            digest = str(hashed.hexdigest())
            if digest == expected:
                out.finish(path)
                return digest
        remove(partial)
        if attempt < _ATTEMPTS:
            _log.warning(
                "%s: its hash is %s, expected %s; fetching it again",
                repo.file(name),
                digest,
                expected,
            )
    return digest


def _chunks(repo: HubRepo, name: str, begin: int, end: int) -> Iterable[bytes]:
    """Yield bytes [begin, end) of a file, from the user's cache if it is there."""
    if begin == end:
        return
    if not (cached := repo.cached(name)):
        yield from repo.chunks(name, begin, end)
        return
    with translated(cached, "read", HubError), open(cached, "rb") as f:
        f.seek(begin)
        while chunk := f.read(_CHUNK_BYTES):
            yield chunk
