"""A model repository on the Hub, pinned to a commit: its files, cached or read by ranges."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from formats.errors import HubError, MoeConvertError, OutputError
from formats.files.io_errors import translated
from formats.files.output_file import make_folders, refuse_links
from formats.files.overlap import lies_in
from formats.files.partial_file import write_file
from formats.hub.http_client import range_client
from formats.hub.hub_errors import client_errors, hub_call, transport_errors
from formats.hub.hub_settings import cache_root, is_offline, progress_bars
from formats.hub.ranges import RangeReader, RemoteFile, Retries
from formats.hub.revision_files import cached_files, listed_files
from formats.repo_names import check_repo_name

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubRepo:
    """The repository `repo` at `commit`. Later changes of a branch are not visible."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]
    """Files by name; offline only those in the cache."""
    offline: bool
    _reader: RangeReader = field(repr=False)
    _token: str | None = field(repr=False)
    _retries: Retries = field(repr=False)
    _revision: str = field(repr=False)

    @classmethod
    def open(
        cls,
        repo: str,
        revision: str | None = None,
        token: str | None = None,
        retries: Retries | None = None,
    ) -> "HubRepo":
        """Open a repository at `revision`: a branch, tag or commit; None for main.

        Endpoint, cache and offline mode are huggingface_hub's settings, and so is the token if
        `token` is None. Raises HubError: no such repository or revision, no access, no connection,
        or offline and not in the cache.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        check_repo_name(repo)
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
        offline = is_offline()
        if offline:
            commit, files = cached_files(repo, revision)
        else:
            commit, files = listed_files(repo, revision, token, retries)
        return cls(repo, commit, files, offline, reader, token, retries, revision or "main")

    @property
    def where(self) -> str:
        """Repository and commit, for messages."""
        return f"{self.repo}@{self.commit[:12]}"

    def file(self, name: str) -> RemoteFile:
        """Return a file by name. Raises HubError if this commit lacks it."""
        if name not in self.files:
            raise HubError(f"{self.where} has no file {name}", "check the name of the repository")
        return self.files[name]

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of a file. Raises HubError."""
        return self._online().read(self.file(name), begin, end)

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """Fill `view` with a file's bytes from `begin` on. Raises HubError."""
        self._online().read_into(self.file(name), begin, view)

    def chunks(self, name: str, begin: int, end: int) -> Iterable[bytes]:
        """Yield bytes [begin, end) of a file in order. Raises HubError."""
        return self._online().chunks(self.file(name), begin, end)

    def cached(self, name: str) -> Path | None:
        """Return the file's path in the user's cache if it is there with the right size, else None.

        The file may belong to another commit with the same content. Never write to it.
        """
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, name, revision=self.commit)
        path = (
            Path(cached)
            if isinstance(cached, str)
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
        """Download files into the cache, or into `local_dir`; return the folder.

        patterns: huggingface_hub's patterns of file names, None for all files. bars: let
        huggingface_hub draw progress bars. Raises HubError, and OutputError for a `local_dir` with
        links or inside the cache.
        """
        from huggingface_hub import snapshot_download

        if local_dir:
            if lies_in(local_dir, self._cache_folder()):
                raise OutputError(
                    f"{local_dir} lies in the Hub's cache", "choose another --local-dir, or none"
                )
            # huggingface_hub replaces links to files, but follows links to folders.
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

        with progress_bars(bars):
            folder = Path(hub_call(fetch, self.repo, self._retries))
        if not (local_dir or self.offline):
            self._record_revision()
        return folder

    def matching(self, patterns: list[str] | None) -> list[RemoteFile]:
        """Return the files that match one of huggingface_hub's patterns (None: all files)."""
        from huggingface_hub.utils import filter_repo_objects

        return [
            self.files[name] for name in filter_repo_objects(self.files, allow_patterns=patterns)
        ]

    def _record_revision(self) -> None:
        """Write the commit of the revision's name into the cache, as huggingface_hub does.

        It writes none for a download by commit, and then finds no model offline by name.
        """
        refs = self._cache_folder() / "refs"
        ref = refs / self._revision
        if self._revision == self.commit:
            return
        commit = self.commit.encode()
        try:
            with translated(ref, "read"):
                if ref.is_file() and ref.read_bytes() == commit:
                    return
            make_folders(refs)
            if lies_in(ref, refs):
                make_folders(ref.parent)
                write_file(ref, commit)
        except MoeConvertError as e:
            _log.info("%s cannot be found offline by %s: %s", self.where, self._revision, e)

    def _cache_folder(self) -> Path:
        return cache_root() / f"models--{self.repo.replace('/', '--')}"

    def _online(self) -> RangeReader:
        if self.offline:
            raise HubError(
                f"{self.repo}: offline (HF_HUB_OFFLINE), and not in the cache", "go online"
            )
        return self._reader
