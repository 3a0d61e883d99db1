"""The commit and files of a repository's revision, from the Hub or from the user's cache."""

import re
from pathlib import Path

from formats.errors import HubError
from formats.hub.hub_errors import hub_call
from formats.hub.ranges import RemoteFile, Retries
from formats.labels import has_controls

MAX_FILES = 20_000
"""Limit for one repository. The largest models have a few hundred files."""
_TIMEOUT_S = 30.0
_NO_MODEL_HINT = "name the repository of a model"


def listed_files(
    repo: str, revision: str | None, token: str | None, retries: Retries
) -> tuple[str, dict[str, RemoteFile]]:
    """Return the commit of `revision` (None: main) and its files by name, as the Hub lists them.

    Raises HubError: no such repository or revision, no access, no connection, or a malformed list.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    info = hub_call(
        lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S),
        repo,
        retries,
    )
    if not re.fullmatch("[0-9a-f]{40}", commit := str(info.sha)):
        raise HubError(f"repository {repo}: the Hub sends commit {commit!r}, which is not a hash")
    if len(listing := info.siblings or []) > MAX_FILES:
        raise HubError(
            f"repository {repo} has {len(listing)} files, the limit is {MAX_FILES}",
            _NO_MODEL_HINT,
        )
    files = {}
    for entry in listing:
        etag = entry.lfs.sha256 if entry.lfs else str(entry.blob_id)
        file = _remote_file(repo, commit, entry.rfilename, entry.size or 0, etag)
        _check_listed(file)
        files[entry.rfilename] = file
    return commit, files


def cached_files(repo: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """Return the commit of `revision` and the files that the user's cache has of it.

    Raises HubError if the cache has none.
    """
    from huggingface_hub import snapshot_download

    def find() -> str:
        return str(
            snapshot_download(
                repo, revision=revision, allow_patterns="config.json", local_files_only=True
            )
        )

    folder = Path(hub_call(find, repo, Retries(attempts=1)))
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        # The cache links to a blob whose name is the file's ETag.
        etag = Path(path.readlink()).name if path.is_symlink() else ""
        files[name] = _remote_file(repo, folder.name, name, path.stat().st_size, etag)
    return folder.name, files


def _check_listed(file: RemoteFile) -> None:
    """Raise HubError if the Hub's name, hash or size of a file is malformed.

    Name and hash become file names on this machine.
    """
    parts = file.name.split("/")
    if (
        has_controls(file.name)
        or "\\" in file.name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise HubError(
            f"{file.repo}@{file.commit[:12]}: the Hub lists a file {file.name[:200]!r}",
            _NO_MODEL_HINT,
        )
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.etag):
        raise HubError(f"{file}: the Hub sends hash {file.etag!r}, which is not a hash")
    if type(file.size) is not int or not 0 <= file.size < 2**53:
        raise HubError(f"{file}: the Hub sends size {file.size!r}, which is not a size")


def _remote_file(repo: str, commit: str, name: str, size: int, etag: str) -> RemoteFile:
    from huggingface_hub import hf_hub_url

    return RemoteFile(name, hf_hub_url(repo, name, revision=commit), repo, commit, size, etag)
