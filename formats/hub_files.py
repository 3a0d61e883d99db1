"""Whole files of a repository, into a folder: resumed, and compared with a known sha256 before they get their name."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from formats.errors import DamageError, HubError
from formats.hub import HubRepo
from formats.io_errors import translated
from formats.layer_file import partial_path
from formats.output_file import OutputFile, make_folders, remove

_CHUNK_BYTES = 4 << 20


def fetch_file(repo: HubRepo, name: str, sha256: str, path: Path, progress: Callable[[int, int], None]) -> None:
    """A whole file, written under another name first; goes on with what an interrupted call left.

    DamageError if it has another sha256 than `sha256`, also the second time.
    """
    size, partial = repo.file(name).size, partial_path(path)
    make_folders(path.parent)
    # In a folder from a stranger it could lead to any file of the user's.
    if partial.is_symlink():
        remove(partial)
    found = ""
    for _ in range(2):
        hasher = hashlib.sha256()
        with OutputFile(partial, keep=True) as out:
            if out.size_bytes > size:
                out.truncate(0)
            end = 0
            while chunk := out.read_at(_CHUNK_BYTES, end):
                hasher.update(chunk)
                end += len(chunk)
            for chunk in _chunks(repo, name, end, size):
                out.write_at(chunk, end)
                hasher.update(chunk)
                end += len(chunk)
                progress(end, size)
            if (found := hasher.hexdigest()) == sha256:
                out.finish(path)
                return
        remove(partial)
    raise DamageError(f"{repo.file(name)}: its sha256 is {found}, the index says {sha256}")


def _chunks(repo: HubRepo, name: str, begin: int, end: int) -> Iterable[bytes]:
    """From the user's cache, if the file is there, else from the Hub."""
    if not (cached := repo.cached(name)):
        yield from repo.chunks(name, begin, end)
        return
    with translated(cached, "read", HubError), open(cached, "rb") as f:
        f.seek(begin)
        while chunk := f.read(_CHUNK_BYTES):
            yield chunk
