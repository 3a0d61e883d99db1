"""Checks that a folder is a complete converted model.

Otherwise it is a checkpoint, an unfinished conversion or download, or something else.
"""

import shlex
from pathlib import Path

from formats import EXPERTS_FOLDER, INDEX_NAME, JOURNAL_NAME, LOCK_NAME, PENDING_NAME, TRUNK_NAME
from formats.errors import MoeConvertError, NotConvertedError

_NAME_HINT = "name a folder that moe-convert wrote"


def is_converted(folder: Path) -> bool:
    """True if `folder` has the index of a converted folder."""
    return (folder / INDEX_NAME).exists()


def check_converted(folder: Path, index_name: str = INDEX_NAME) -> None:
    """Raise NotConvertedError unless `folder` is a complete conversion.

    Raises MoeConvertError if it is no folder. A conversion that lost its index passes: opening it
    reports the missing index.
    """
    if not folder.exists():
        raise MoeConvertError(f"{folder} is not a folder: it does not exist", _NAME_HINT)
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
    """Raise NotConvertedError if `folder` holds an unfinished conversion or download."""
    if (folder / INDEX_NAME).exists():
        return
    if any((folder / name).exists() for name in (JOURNAL_NAME, LOCK_NAME)):
        raise NotConvertedError(
            f"{folder} holds an unfinished conversion",
            "run the same convert command again: it continues",
        )
    if (folder / PENDING_NAME).exists():
        raise NotConvertedError(
            f"{folder} holds an unfinished download",
            "load it with --lazy by its name on the Hub, or run moe-convert download OWNER/MODEL",
        )
