"""A model repository on the Hub, pinned to a commit: what it holds, what of it is in the user's
cache, its bytes.

Converter and loader both read repositories, by the same rules for tokens, retries and errors.
"""

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from formats.errors import HubError, MoeConvertError, OutputError
from formats.files.io_errors import io_error
from formats.files.output_file import refuse_links
from formats.files.overlap import lies_in
from formats.files.paths import similar_folders
from formats.hub.range_client import range_client
from formats.hub.ranges import AGAIN_HINT, RangeReader, RemoteFile, Retries
from formats.labels import has_controls

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_TIMEOUT_S = 30.0
MAX_FILES = 20_000
"""Of a repository: the largest models have a few hundred."""
_NO_MODEL_HINT = "name the repository of a model"
T = TypeVar("T")


def is_repo_name(text: str) -> bool:
    """Whether `text` has the form owner/model."""
    return (
        len(text) <= 96
        and _REPO.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
    )


def repo_of_address(text: str) -> str | None:
    """owner/model of the address of a repository's page or of something on it; None for anything
    else.

    A path's `https:/` counts as `https://`.
    """
    match = re.fullmatch(
        r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/|https?:/+[^/]+/|hf:/+)([^/]+/[^/?#]+)(?:[/?#].*)?",
        text,
    )
    repo = match[1].removesuffix(".git") if match else ""
    return repo if is_repo_name(repo) else None


def is_offline() -> bool:
    """Whether huggingface_hub was told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def kept_root() -> Path:
    """Where we keep things (models of which a part is there): HF_HOME/moe-convert, beside
    huggingface_hub's cache.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HOME, "moe-convert")


def cache_root() -> Path:
    """huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class HubRepo:
    """`repo` at `commit`; nothing that happens to a branch later is seen."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]
    """Name -> file. Offline: those in the cache."""
    offline: bool
    _reader: RangeReader = field(repr=False)
    _token: str | None = field(repr=False)
    _retries: Retries = field(repr=False)

    @classmethod
    def open(
        cls,
        repo: str,
        revision: str | None = None,
        token: str | None = None,
        retries: Retries | None = None,
    ) -> "HubRepo":
        """Resolves `revision` (branch, tag or commit; None: main) once. Endpoint, cache and offline
        mode are huggingface_hub's, and so is the token where none is given.

        Raises HubError: no such repository or revision, no access, no connection, offline and not
        in the cache.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers

        if not is_repo_name(repo):
            raise HubError(f"{repo!r} is not the name of a repository", "name it as owner/model")
        retries = retries or Retries()
        headers = build_hf_headers(token=token, library_name="moe-convert")
        timeout_s = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        reader = RangeReader(
            range_client,
            headers,
            transport_errors(),
            client_errors("InvalidURL"),
            timeout_s=timeout_s,
            retries=retries,
        )
        if constants.is_offline_mode():
            commit, files = _cached_files(repo, revision)
            return cls(repo, commit, files, True, reader, token, retries)
        api = HfApi(token=token)
        info = hub_call(
            lambda: api.model_info(
                repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
            ),
            repo,
            retries,
        )
        if not re.fullmatch("[0-9a-f]{40}", commit := str(info.sha)):
            raise HubError(f"repository {repo}: the Hub says commit {commit!r}, which is none")
        if len(listing := info.siblings or []) > MAX_FILES:
            raise HubError(
                f"repository {repo} has {len(listing)} files, allowed are {MAX_FILES}",
                _NO_MODEL_HINT,
            )
        files = {
            s.rfilename: _remote(
                repo, commit, s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else str(s.blob_id)
            )
            for s in listing
        }
        for file in files.values():
            _check_listed(file)
        return cls(repo, commit, files, False, reader, token, retries)

    def file(self, name: str) -> RemoteFile:
        """HubError if there is no such file at this commit."""
        if name not in self.files:
            raise HubError(
                f"{self.repo}@{self.commit[:12]} has no file {name}",
                "check the name of the repository",
            )
        return self.files[name]

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin..end (exclusive) of a file; `RangeReader.read` says what is raised."""
        return self._online().read(self.file(name), begin, end)

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """Fills `view` with a file's bytes from `begin` on."""
        self._online().read_into(self.file(name), begin, view)

    def chunks(self, name: str, begin: int, end: int) -> Iterable[bytes]:
        """A file's bytes begin..end in order, in pieces."""
        return self._online().chunks(self.file(name), begin, end)

    def cached(self, name: str) -> Path | None:
        """The file's place in the user's cache, of this commit or another with the same content, if
        it is there with the size that it should have. Never write to it.
        """
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        path = (
            Path(found)
            if isinstance(found, str)
            else self._cache_folder() / "blobs" / self.file(name).etag
        )
        return path if path.is_file() and path.stat().st_size == self.file(name).size else None

    def snapshot(
        self,
        patterns: list[str] | None = None,
        *,
        local_dir: Path | None = None,
        bars: bool = False,
    ) -> Path:
        """The cache's folder of this commit (or `local_dir`), after fetching the files that match;
        None for all.

        bars: whether huggingface_hub draws its progress. Raises HubError.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        if local_dir:
            if lies_in(local_dir, self._cache_folder()):
                raise OutputError(
                    f"{local_dir} lies in the Hub's cache", "choose another --local-dir, or none"
                )
            # huggingface_hub replaces a file that is a link, and follows folders that are.
            folders = (str(Path(file.name).parent) for file in self.matching(patterns))
            refuse_links(local_dir, [*folders, ".cache/huggingface/download"])

        def fetch() -> str:
            only = {
                "allow_patterns": patterns,
                "local_files_only": self.offline,
                "local_dir": local_dir,
            }
            return str(
                snapshot_download(self.repo, revision=self.commit, token=self._token, **only)
            )

        quiet = bars or are_progress_bars_disabled()
        if not quiet:
            disable_progress_bars()
        try:
            return Path(hub_call(fetch, self.repo, self._retries))
        finally:
            if not quiet:
                enable_progress_bars()

    def matching(self, patterns: list[str] | None) -> list[RemoteFile]:
        """The files that match one of huggingface_hub's patterns; None for all."""
        from huggingface_hub.utils import filter_repo_objects

        return [
            self.files[name] for name in filter_repo_objects(self.files, allow_patterns=patterns)
        ]

    def _cache_folder(self) -> Path:
        return cache_root() / f"models--{self.repo.replace('/', '--')}"

    def _online(self) -> RangeReader:
        if self.offline:
            raise HubError(
                f"{self.repo}: offline (HF_HUB_OFFLINE), and not in the cache", "go online"
            )
        return self._reader


def hub_call(call: Callable[[], T], repo: str, retries: Retries) -> T:
    """What `call`, which uses huggingface_hub, gives; retried on broken lines, 429 and 5xx. Its
    errors as HubError.

    The errors carry neither a token nor the request that had one.
    """
    for failures in range(1, retries.attempts + 1):
        try:
            return call()
        except Exception as e:
            judged = _judge(e, repo)
            if judged is None:
                raise
        problem, asked_s, again = judged
        if not again or failures == retries.attempts or (asked_s or 0) > retries.longest_s:
            raise problem
        retries.pause(failures, asked_s)
    raise ValueError("no attempts")


def transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client raises on broken lines and timeouts."""
    return (*client_errors("TransportError"), ConnectionError, TimeoutError)


def client_errors(name: str) -> tuple[type[Exception], ...]:
    """The HTTP client's exception of this name: httpx's (huggingface_hub 1) or httpx2's; none of
    another client.
    """
    from huggingface_hub.utils import get_session

    for kind in type(get_session()).__mro__:
        module = importlib.import_module(kind.__module__.partition(".")[0])
        if error := getattr(module, name, None):
            return (error,)
    return ()


def _judge(error: Exception, repo: str) -> tuple[MoeConvertError, float | None, bool] | None:
    """(as ours, the pause that it asks for, whether to try again) of an error of huggingface_hub;
    None of another.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import LocalEntryNotFoundError

    page = "accept the terms on its page on the Hub, and give a token that may read it: hf auth login, or --token"
    known: list[tuple[type[Exception], str, str]] = [
        (errors.GatedRepoError, "is gated, and the token (if any) has no access", page),
        (
            errors.RepositoryNotFoundError,
            "is not there (nor a folder of that name)",
            _meant(repo) or "check the name; a private one needs a token: hf auth login",
        ),
        (
            errors.RevisionNotFoundError,
            "has no such revision",
            "check --revision: a branch, tag or commit",
        ),
        (errors.OfflineModeIsEnabled, "cannot be reached offline (HF_HUB_OFFLINE)", "go online"),
    ]
    for kind, what, hint in known:
        if isinstance(error, kind):
            return HubError(f"repository {repo} {what}", hint), None, False
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        after = error.response.headers.get("Retry-After", "")
        asked_s = float(after) if after.isdecimal() else None
        hint = "check the token: hf auth login, or --token" if status in (401, 403) else AGAIN_HINT
        again = status in (408, 429) or status >= 500
        return (
            HubError(f"repository {repo}: the Hub answered with status {status}", hint),
            asked_s,
            again,
        )
    if isinstance(error, LocalEntryNotFoundError):
        if constants.is_offline_mode():
            what = f"repository {repo} is not in the cache (nor is there a folder of that name), and HF_HUB_OFFLINE is set"
            fetch = f"go online, or fetch it where that is possible: hf download {repo}"
            return HubError(what, _meant(repo) or fetch), None, False
        what = f"repository {repo}: the Hub cannot be reached, and the cache has not all files"
        return HubError(what, AGAIN_HINT), None, True
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError | TimeoutError)
    ):
        return io_error(error, constants.HF_HUB_CACHE, "written", HubError), None, False
    if isinstance(error, client_errors("InvalidURL") + client_errors("UnsupportedProtocol")):
        return (
            HubError(f"repository {repo}: an address that is none: {error}", "check HF_ENDPOINT"),
            None,
            False,
        )
    # huggingface_hub says by a plain OSError that a file came with another size.
    if isinstance(error, (*transport_errors(), OSError)):
        return (
            HubError(f"repository {repo}: {type(error).__name__}: {error}", AGAIN_HINT),
            None,
            True,
        )
    return None


def _meant(repo: str) -> str:
    """A hint with the folders that are named like `repo`, which may be a mistyped path; empty if
    there are none.
    """
    near = similar_folders(Path(repo)) if Path(repo).parent.is_dir() else []
    return f"is the folder {' or '.join(near)} meant?" if near else ""


def _check_listed(file: RemoteFile) -> None:
    """HubError unless name and hash, which become names of files, and the size are what a Hub may
    say.
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
        raise HubError(f"{file}: the Hub says hash {file.etag!r}, which is none")
    if type(file.size) is not int or not 0 <= file.size < 2**53:
        raise HubError(f"{file}: the Hub says size {file.size!r}, which is none")


def _remote(repo: str, commit: str, name: str, size: int, etag: str) -> RemoteFile:
    from huggingface_hub import hf_hub_url

    return RemoteFile(name, hf_hub_url(repo, name, revision=commit), repo, commit, size, etag)


def _cached_files(repo: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """Commit and files of what the cache holds."""
    from huggingface_hub import snapshot_download

    folder = Path(hub_call(lambda: snapshot_download(repo, revision=revision, allow_patterns="config.json",
                           local_files_only=True), repo, Retries(attempts=1)))  # fmt: skip
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        # A link of the cache leads to a blob that is named by its ETag.
        etag = Path(path.readlink()).name if path.is_symlink() else ""
        files[name] = _remote(repo, folder.name, name, path.stat().st_size, etag)
    return folder.name, files
