"""Whole files of a repository: small ones in memory; any into a folder, resumed, and compared with
a known sha256 before they get their name.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from formats.config.side_files import MAX_BYTES
from formats.errors import DamageError, HubError
from formats.files.io_errors import translated
from formats.files.output_file import OutputFile, make_folders, remove
from formats.hub.ranges import RemoteFile
from formats.hub.repo import HubRepo
from formats.layer_file import partial_path

MAX_SMALL_BYTES = 16 << 20
"""Of index, config.json and the like: an index has 300 bytes an expert."""
_CHUNK_BYTES = 4 << 20


def fetch_file(
    repo: HubRepo, name: str, sha256: str, path: Path, progress: Callable[[int, int], None]
) -> None:
    """A whole file, written under another name first; goes on with what an interrupted call left.

    DamageError if it has another sha256 than `sha256`, also the second time.
    """
    file, partial = repo.file(name), partial_path(path)
    size = file.size
    if file.sha256 not in (None, sha256):
        raise DamageError(f"{file}: its sha256 is {file.sha256}, the index says {sha256}")
    if file.sha256 is None and size > MAX_BYTES:
        raise DamageError(f"{file} has {size} bytes, allowed are {MAX_BYTES}")
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
    raise DamageError(f"{file}: its sha256 is {found}, the index says {sha256}")


def _chunks(repo: HubRepo, name: str, begin: int, end: int) -> Iterable[bytes]:
    """From the user's cache, if the file is there, else from the Hub."""
    if not (cached := repo.cached(name)):
        yield from repo.chunks(name, begin, end)
        return
    with translated(cached, "read", HubError), open(cached, "rb") as f:
        f.seek(begin)
        while chunk := f.read(_CHUNK_BYTES):
            yield chunk


def read_small_file(repo: HubRepo, name: str) -> bytes:
    """A whole small file, from the user's cache or the Hub, compared with the Hub's hash. HubError,
    DamageError.
    """
    file = repo.file(name)
    if file.size > MAX_SMALL_BYTES:
        raise DamageError(f"{file} has {file.size} bytes, allowed are {MAX_SMALL_BYTES}")
    if cached := repo.cached(name):
        with translated(cached, "read", HubError):
            data = cached.read_bytes()
        # Without links a cache does not say the hash.
        if not file.etag or _hash_of(file, data) == file.etag:
            return data
    data = repo.read(name, 0, file.size)
    if (found := _hash_of(file, data)) != file.etag:
        raise DamageError(f"{file}: its hash is {found}, the Hub says {file.etag}")
    return data


def _hash_of(file: RemoteFile, data: bytes) -> str:
    hasher = file.hasher()
    hasher.update(data)
    return str(hasher.hexdigest())
