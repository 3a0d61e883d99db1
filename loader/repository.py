"""Opens the model to load: a local folder, or a repository on the Hub, whole or lazily."""

import os
from dataclasses import dataclass
from pathlib import Path

from formats.artifact import Artifact, Head, read_head
from formats.config.recorded_config import CONFIG_NAME
from formats.config.side_files import is_read_by_transformers
from formats.errors import MoeConvertError, RecipeError
from formats.hub.lazy_folder import LazyFolder
from formats.hub.lazy_reader import HubReader
from formats.hub.repo import HubRepo
from formats.hub.repo_listing import fetch_listed
from formats.progress import Progress, no_progress
from formats.reading.reader import ExpertReader
from formats.reading.readers import READERS
from formats.repo_names import is_repo_name

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class OpenModel:
    """A converted model whose structure was checked.

    lazy: its folder, while experts are still being downloaded; else None.
    """

    artifact: Artifact
    lazy: LazyFolder | None = None
    progress: Progress = no_progress

    def io(self, option: str) -> str:
        """Return how to read for the option `io`. RecipeError: missing experts cannot be mapped."""
        if self.lazy and option == "mmap":
            raise RecipeError(
                "io: 'mmap' needs all experts, but with lazy some are still being downloaded",
                "use io='direct'",
            )
        return "direct" if self.lazy else option

    def reader(self, io: str, *, check: str) -> ExpertReader:
        """Return a reader of the experts. io: a name in READERS."""
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
    """Open a folder, or the repository of that name if there is no such folder.

    Raises HubError, the errors of Artifact.open, and RecipeError for options that only
    repositories have.
    """
    if not _is_repo(folder):
        if revision or lazy:
            raise RecipeError(
                f"revision, lazy: only for a repository on the Hub, but {folder} is a folder"
            )
        return OpenModel(Artifact.open(folder))
    if not lazy:
        repo = HubRepo.open(os.fspath(folder), revision, token)
        return OpenModel(Artifact.open(fetch_listed(repo, bars=True)[0]))
    opened = LazyFolder.open(os.fspath(folder), revision, token, progress=progress or no_progress)
    return OpenModel(opened.artifact, None if opened.complete else opened, progress or no_progress)


def small_files(folder: Folder, revision: str | None, token: str | None) -> Path:
    """Return a folder with the tokenizer's files: `folder` itself, or one in the Hub's cache.

    Of a repository only the index and the small files that it lists are downloaded.
    """
    if not _is_repo(folder):
        if os.path.isdir(folder):
            return Path(folder)
        raise MoeConvertError(
            f"{folder} is not a folder", "name a folder that moe-convert wrote, or owner/model"
        )
    repo = HubRepo.open(os.fspath(folder), revision, token)
    return fetch_listed(repo, wanted=is_read_by_transformers, bars=True)[0]


def head_of_repository(folder: Folder, revision: str | None, token: str | None) -> Head | None:
    """Return index and config.json of a repository, without its weights; None for a folder."""
    if not _is_repo(folder):
        return None
    repo = HubRepo.open(os.fspath(folder), revision, token)
    return read_head(fetch_listed(repo, wanted=CONFIG_NAME.__eq__)[0])


def _is_repo(folder: Folder) -> bool:
    if not isinstance(folder, str | os.PathLike):
        raise RecipeError(f"folder: {folder!r} is neither a path nor owner/model")
    return not os.path.exists(folder) and is_repo_name(os.fspath(folder))
