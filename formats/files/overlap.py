"""Refusal of outputs that would overwrite an input.

Paths are compared by device and inode: links, mounts and case-insensitive names hide nothing.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from formats.errors import MoeConvertError, OutputError

_Identity = tuple[int, int]


def refuse_overlap(out: Path, folder: Path, what: str) -> None:
    """Raise OutputError if the folder `out` is `folder`, lies in it, or contains it.

    `out` need not exist. what: the role of `folder` in the message, such as "the source".
    """
    hint = "choose another folder, beside it"
    if lies_in(out, folder):
        how = "is" if lies_in(folder, out) else "lies in"
        raise OutputError(f"{out} {how} {what} {folder}, which is only read", hint)
    if lies_in(folder, out):
        raise OutputError(f"{out} contains {what} {folder}, which is only read", hint)


def lies_in(path: Path, folder: Path) -> bool:
    """True if `path` is `folder` or lies anywhere in it. `path` need not exist."""
    identity = _identity(folder)
    real = Path(os.path.realpath(path))
    return identity is not None and identity in map(_identity, (real, *real.parents))


def refuse_inputs(
    outputs: Iterable[Path], inputs: Iterable[Path], kind: type[MoeConvertError] = OutputError
) -> None:
    """Raise `kind` if one of the files `outputs` is one of `inputs`. `outputs` need not exist."""
    input_by_identity = {identity: path for path in inputs if (identity := _identity(path))}
    for path in outputs:
        if (identity := _identity(path)) in input_by_identity:
            raise kind(
                f"{path} is also read: it is the input {input_by_identity[identity]}",
                "choose another name for the output",
            )


def _identity(path: Path) -> _Identity | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError):
        return None
    return status.st_dev, status.st_ino
