"""What to load: a folder here, or a repository on the Hub, whole or as it is needed."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from formats.artifact import Artifact
from formats.config.side_files import is_read_by_transformers
from formats.errors import MoeConvertError, RecipeError
from formats.hub.lazy_folder import LazyFolder
from formats.hub.lazy_reader import HubReader
from formats.hub.repo import HubRepo, is_repo_name
from formats.hub.repo_listing import fetch_listed
from formats.reading.reader import ExpertReader
from formats.reading.readers import READERS

Folder = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes there, bytes of all), from any thread."""


@dataclass(frozen=True)
class OpenModel:
    """A converted model whose structure was checked. lazy: of one whose experts are not all there."""

    artifact: Artifact
    lazy: LazyFolder | None = None
    progress: Progress | None = None

    def io(self, wish: str) -> str:
        """How to read: what is not there cannot be mapped."""
        if self.lazy and wish == "mmap":
            raise RecipeError(
                "io: 'mmap' needs all experts, and with lazy they are still coming",
                "use io='direct'",
            )
        return "direct" if self.lazy else wish

    def reader(self, io: str, *, check: str) -> ExpertReader:
        """A reader of the experts, by the name in READERS."""
        if self.lazy:
            return HubReader(self.lazy, check=check, progress=self.progress)
        return READERS[io](self.artifact, check=check)


def open_model(
    folder: Folder,
    revision: str | None,
    token: str | None,
    *,
    lazy: bool,
    progress: Progress | None,
) -> OpenModel:
    """Opens a folder, or a repository of that name where there is no such folder. Raises HubError,
    RecipeError for options that only repositories have, and what Artifact.open raises.
    """
    if not _is_repo(folder):
        if revision or lazy:
            raise RecipeError(
                f"revision, lazy: only for a repository on the Hub, and {folder} is a folder's name"
            )
        return OpenModel(Artifact.open(folder))
    if not lazy:
        repo = HubRepo.open(os.fspath(folder), revision, token)
        return OpenModel(Artifact.open(fetch_listed(repo, bars=True)[0]))
    opened = LazyFolder.open(os.fspath(folder), revision, token, progress=progress)
    return OpenModel(opened.artifact, None if opened.complete else opened, progress)


def small_files(folder: Folder, revision: str | None, token: str | None) -> Path:
    """The folder, or one in huggingface_hub's cache with the index and the tokenizer's files that
    it lists.
    """
    if not _is_repo(folder):
        if os.path.isdir(folder):
            return Path(folder)
        raise MoeConvertError(
            f"{folder} is not a folder", "name a folder that moe-convert wrote, or owner/model"
        )
    repo = HubRepo.open(os.fspath(folder), revision, token)
    return fetch_listed(repo, wanted=is_read_by_transformers, bars=True)[0]


def _is_repo(folder: Folder) -> bool:
    if not isinstance(folder, str | os.PathLike):
        raise RecipeError(f"folder: {folder!r} is neither a path nor owner/model")
    return not os.path.exists(folder) and is_repo_name(os.fspath(folder))
