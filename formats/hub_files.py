"""Whole files of a repository, into a folder: resumed, and compared with a known sha256 before they get their name."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from formats.errors import DamageError
from formats.hub import HubRepo
from formats.layer_file import partial_path
from formats.writer import fsync_folder

_CHUNK_BYTES = 4 << 20


def fetch_file(repo: HubRepo, name: str, sha256: str, path: Path, progress: Callable[[int, int], None]) -> None:
    """A whole file, written under another name first; goes on with what an interrupted call left.

    DamageError if it has another sha256 than `sha256`, also the second time.
    """
    size, partial = repo.file(name).size, partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = ""
    for _ in range(2):
        hasher = hashlib.sha256()
        with open(partial, "a+b") as out:
            out.seek(0)
            while chunk := out.read(_CHUNK_BYTES):
                hasher.update(chunk)
            if out.tell() > size:
                out.truncate(0)
                hasher = hashlib.sha256()
            for chunk in _chunks(repo, name, out.tell(), size):
                out.write(chunk)
                hasher.update(chunk)
                progress(out.tell(), size)
            out.flush()
            os.fsync(out.fileno())
        if (found := hasher.hexdigest()) == sha256:
            os.replace(partial, path)
            fsync_folder(path.parent)
            return
        partial.unlink()
    raise DamageError(f"{repo.file(name)}: its sha256 is {found}, the index says {sha256}")


def _chunks(repo: HubRepo, name: str, begin: int, end: int) -> Iterable[bytes]:
    """From the user's cache, if the file is there, else from the Hub."""
    if not (cached := repo.cached(name)):
        yield from repo.chunks(name, begin, end)
        return
    with open(cached, "rb") as f:
        f.seek(begin)
        while chunk := f.read(_CHUNK_BYTES):
            yield chunk
