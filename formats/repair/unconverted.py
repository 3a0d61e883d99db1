"""What a folder without an index is: a checkpoint, a conversion or download that has not ended, or
something else.
"""

import shlex
from pathlib import Path

from formats import EXPERTS_FOLDER, INDEX_NAME, JOURNAL_NAME, LOCK_NAME, PENDING_NAME, TRUNK_NAME
from formats.errors import MoeConvertError, NotConvertedError
from formats.hub.repo import HubRepo

_NAME_HINT = "name a folder that moe-convert wrote"


def check_converted(folder: Path, index_name: str = INDEX_NAME) -> None:
    """NotConvertedError if `folder` is no complete conversion; MoeConvertError if there is no such
    folder.

    A folder that has lost its index passes: its reader says that the index is missing.
    """
    if not folder.exists():
        raise MoeConvertError(
            f"{folder} is not a folder: there is nothing of that name", _NAME_HINT
        )
    if not folder.is_dir():
        raise MoeConvertError(f"{folder} is not a folder but a file", _NAME_HINT)
    if (folder / index_name).exists():
        return
    check_finished(folder)
    if (folder / TRUNK_NAME).exists() or any(folder.glob(f"{EXPERTS_FOLDER}/layer-*")):
        return
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        raise NotConvertedError(
            f"{folder} is not converted: it has no {INDEX_NAME}",
            f"moe-convert convert {shlex.quote(str(folder))}",
        )
    raise NotConvertedError(f"{folder} is not converted: it has no {INDEX_NAME}", _NAME_HINT)


def check_finished(folder: Path) -> None:
    """NotConvertedError if a conversion or a download into `folder` has begun and not ended."""
    if (folder / INDEX_NAME).exists():
        return
    if any((folder / name).exists() for name in (JOURNAL_NAME, LOCK_NAME)):
        raise NotConvertedError(
            f"{folder} holds an unfinished conversion",
            "run the same convert command again: it goes on",
        )
    if (folder / PENDING_NAME).exists():
        raise NotConvertedError(
            f"{folder} holds an unfinished download",
            "load it with --lazy by its name on the Hub, or download it whole",
        )


def check_converted_repo(repo: HubRepo) -> None:
    """NotConvertedError if the repository holds no converted model; offline not all files are
    known, and it passes.
    """
    if INDEX_NAME not in repo.files and not repo.offline:
        raise NotConvertedError(
            f"{repo.repo}@{repo.commit[:12]} on the Hub is not converted: it has no {INDEX_NAME}",
            f"moe-convert convert {repo.repo}",
        )
