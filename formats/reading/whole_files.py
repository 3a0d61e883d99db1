"""Checks of the trunk and the side files against the index, before they are used."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from formats import INDEX_NAME
from formats.config.generation_config import GENERATION_NAME
from formats.config.recorded_config import CONFIG_NAME
from formats.errors import DamageError
from formats.files.io_errors import translated
from formats.files.paths import locate, open_regular
from formats.index import Index
from formats.repair_hints import repair_command

RUN_TIME_FILES = (CONFIG_NAME, GENERATION_NAME)
"""Files that a user may edit. `read_recorded_config` lists the editable fields of config.json."""


def file_sha256(folder: Path, name: str) -> str:
    """Return the sha256 of a file in `folder`, in hex.

    Raises OSError; DamageError or PathError if there is no such regular file.
    """
    with os.fdopen(open_regular(locate(folder, name, str(folder))), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, index: Index, names: Iterable[str]) -> None:
    """Raise DamageError for the first of the listed files `names` with a wrong sha256.

    RUN_TIME_FILES are not compared.
    """
    for name in names:
        if name in RUN_TIME_FILES:
            continue
        expected = index.whole_files[name][1]
        with translated(folder / name, "read", DamageError):
            sha256 = file_sha256(folder, name)
        if sha256 != expected:
            raise DamageError(
                f"{folder / name}: its sha256 is {sha256}, the index says {expected};"
                " with check none it would be used",
                repair_command(folder, index),
            )


def generation_note(folder: Path, index: Index) -> str | None:
    """Describe a change of generation_config.json since the conversion; None if there is none.

    Raises MoeConvertError if the file cannot be read.
    """
    listed = index.whole_files.get(GENERATION_NAME)
    if not (folder / GENERATION_NAME).exists():
        return f"{folder / GENERATION_NAME} was removed since the conversion" if listed else None
    if listed is None:
        return f"{folder / GENERATION_NAME} is used, although {INDEX_NAME} does not list it"
    with translated(folder / GENERATION_NAME, "read", DamageError):
        if file_sha256(folder, GENERATION_NAME) == listed[1]:
            return None
    return f"{folder / GENERATION_NAME} was changed since the conversion; the new values are used"
