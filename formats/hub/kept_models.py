"""The folders in HF_HOME/moe-convert: lazily loaded models, and compiled GPU kernels."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from formats import INDEX_NAME, PENDING_NAME
from formats.errors import OutputError
from formats.files.io_errors import translated
from formats.hub.hub_settings import KERNELS_FOLDER, kept_root
from formats.hub.lazy_folder import RECORD_NAME

_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class KeptFolder:
    """A folder in `kept_root`.

    name: owner/model, or "GPU kernels". commit: 40 hex digits, "" for kernels. size_bytes: disk
    space that its files take; holes in files count nothing. state: "complete", "N experts",
    "unfinished", or "" for kernels. written_s: seconds since 1970 of the last write.
    """

    path: Path
    name: str
    commit: str
    size_bytes: int
    state: str
    written_s: float


def kept_folders() -> list[KeptFolder]:
    """Return the folders in `kept_root`, by name and commit. OutputError if one is unreadable."""
    root = kept_root()
    with translated(root, "read", OutputError):
        return sorted(_folders(root), key=lambda kept: (kept.name, kept.commit))


def remove_kept(kept: KeptFolder) -> None:
    """Remove the folder and what only it needs. OutputError if that fails.

    A program that has the model open keeps its open files, but not the experts still to fetch.
    """
    with translated(kept.path, "removed", OutputError):
        shutil.rmtree(kept.path)
        if kept.commit:
            owner = kept.path.parent
            (owner / f".{kept.commit}.lock").unlink(missing_ok=True)
            if not any(_COMMIT.fullmatch(other.name) for other in owner.iterdir()):
                shutil.rmtree(owner)


def _folders(root: Path) -> Iterator[KeptFolder]:
    if not root.is_dir():
        return
    for folder in root.iterdir():
        if folder.is_symlink() or not folder.is_dir():
            continue
        if folder.name == KERNELS_FOLDER:
            yield _kept(folder, "GPU kernels", "", "")
            continue
        for model in folder.iterdir():
            if _COMMIT.fullmatch(model.name) and model.is_dir() and not model.is_symlink():
                name = folder.name.replace("--", "/", 1)
                yield _kept(model, name, model.name, _state(model))


def _kept(path: Path, name: str, commit: str, state: str) -> KeptFolder:
    statuses = [
        os.lstat(os.path.join(folder, file)) for folder, _, files in os.walk(path) for file in files
    ]
    size_bytes = sum(status.st_blocks * 512 for status in statuses)
    written_s = max((status.st_mtime for status in statuses), default=path.stat().st_mtime)
    return KeptFolder(path, name, commit, size_bytes, state, written_s)


def _state(folder: Path) -> str:
    if (folder / INDEX_NAME).exists():
        return "complete"
    if not (folder / PENDING_NAME).exists():
        return "unfinished"
    record = folder / RECORD_NAME
    there = record.read_bytes().count(1) if record.is_file() else 0
    return f"{there} experts"
