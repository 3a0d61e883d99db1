"""Whole files of a converted model's repository, checked before use: on disk or in memory."""

import hashlib
from pathlib import Path

from formats.config.side_files import MAX_BYTES
from formats.errors import DamageError, HubError
from formats.files.io_errors import translated
from formats.files.output_file import make_folders, remove
from formats.files.partial_file import partial_path
from formats.hub.download import download_file
from formats.hub.ranges import RemoteFile
from formats.hub.repo import HubRepo
from formats.progress import Progress, no_progress

MAX_SMALL_BYTES = 16 << 20
"""Limit for index, config.json and the like. An index has about 300 bytes for each expert."""


def fetch_file(
    repo: HubRepo,
    name: str,
    sha256: str,
    path: Path,
    progress: Progress = no_progress,
    *,
    stage: str = "fetching",
) -> None:
    """Download a file to `path`, resuming an interrupted download.

    Raises DamageError if the sha256 is not `sha256` after two attempts; HubError, OutputError,
    DoesNotFitError.
    """
    file = repo.file(name)
    partial = partial_path(path)
    size = file.size
    if file.sha256 not in (None, sha256):
        raise DamageError(f"{file}: its sha256 is {file.sha256}, the index says {sha256}")
    if file.sha256 is None and size > MAX_BYTES:
        raise DamageError(f"{file} has {size} bytes, the limit is {MAX_BYTES}")
    make_folders(path.parent)
    # In a stranger's folder, a link could lead to any of the user's files.
    if partial.is_symlink():
        remove(partial)
    digest = download_file(
        repo,
        name,
        path,
        hasher=hashlib.sha256,
        expected=sha256,
        advance=lambda done: progress(stage, done, size),
    )
    if digest != sha256:
        raise DamageError(f"{file}: its sha256 is {digest}, the index says {sha256}")


def read_small_file(repo: HubRepo, name: str) -> bytes:
    """Return a whole small file from the user's cache or the Hub, compared with the Hub's hash.

    Raises HubError; DamageError for a wrong hash or more than MAX_SMALL_BYTES.
    """
    file = repo.file(name)
    if file.size > MAX_SMALL_BYTES:
        raise DamageError(f"{file} has {file.size} bytes, the limit is {MAX_SMALL_BYTES}")
    if cached := repo.cached(name):
        with translated(cached, "read", HubError):
            data = cached.read_bytes()
        # A cache without links does not state the hash.
        if not file.etag or _hash_of(file, data) == file.etag:
            return data
    data = repo.read(name, 0, file.size)
    if (digest := _hash_of(file, data)) != file.etag:
        raise DamageError(f"{file}: its hash is {digest}, the Hub says {file.etag}")
    return data


def _hash_of(file: RemoteFile, data: bytes) -> str:
    hasher = file.hasher()
    hasher.update(data)
    return str(hasher.hexdigest())
