"""The trunk and the files beside the weights, compared with the index before they are used."""

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
from formats.repair.repair_hints import repair_command

RUN_TIME_FILES = (CONFIG_NAME, GENERATION_NAME)
"""Files in which a user may change something; of config.json `read_recorded_config` says what."""


def file_sha256(folder: Path, name: str) -> str:
    """The sha256 of a file of `folder`, in hex. OSError; DamageError or PathError where there is no
    such file.
    """
    with os.fdopen(open_regular(locate(folder, name, str(folder))), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, index: Index, names: Iterable[str]) -> None:
    """DamageError naming the first of the files `names`, which the index lists, whose sha256 is not
    the index's.

    Of RUN_TIME_FILES none is compared.
    """
    for name in names:
        if name in RUN_TIME_FILES:
            continue
        expected = index.whole_files[name][1]
        with translated(folder / name, "read", DamageError):
            found = file_sha256(folder, name)
        if found != expected:
            raise DamageError(
                f"{folder / name}: its sha256 is {found}, the index says {expected}; with check none it would be used",
                repair_command(folder, index),
            )


def generation_note(folder: Path, index: Index) -> str | None:
    """What was done to generation_config.json since the conversion, None for nothing.
    MoeConvertError if that cannot be read.
    """
    listed = index.whole_files.get(GENERATION_NAME)
    if not (folder / GENERATION_NAME).exists():
        return f"{folder / GENERATION_NAME} was removed since the conversion" if listed else None
    if listed is None:
        return f"{folder / GENERATION_NAME} is used, and {INDEX_NAME} does not list it"
    with translated(folder / GENERATION_NAME, "read", DamageError):
        if file_sha256(folder, GENERATION_NAME) == listed[1]:
            return None
    return f"{folder / GENERATION_NAME} was changed since the conversion, and is used as it is now"
