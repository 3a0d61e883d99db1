"""Outputs that would damage an input: compared by device and inode, so that links, mounts and case
hide nothing.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from formats.errors import MoeConvertError, OutputError

_Identity = tuple[int, int]


def refuse_overlap(out: Path, folder: Path, what: str) -> None:
    """OutputError if the folder `out`, which need not exist, is `folder`, lies in it, or has it
    inside. what: what `folder` is, for the message.
    """
    hint = "choose another folder, beside it"
    if lies_in(out, folder):
        how = "is" if lies_in(folder, out) else "lies in"
        raise OutputError(f"{out} {how} {what} {folder}, which is only read", hint)
    if lies_in(folder, out):
        raise OutputError(f"{out} has {what} {folder} inside, which is only read", hint)


def lies_in(path: Path, folder: Path) -> bool:
    """True if `path`, which need not exist, is `folder` or lies somewhere in it."""
    identity = _identity(folder)
    real = Path(os.path.realpath(path))
    return identity is not None and identity in map(_identity, (real, *real.parents))


def refuse_inputs(
    outputs: Iterable[Path], inputs: Iterable[Path], kind: type[MoeConvertError] = OutputError
) -> None:
    """`kind` if one of the files `outputs`, which need not exist, is one of the files `inputs`."""
    read = {identity: path for path in inputs if (identity := _identity(path))}
    for path in outputs:
        if (identity := _identity(path)) in read:
            raise kind(
                f"{path} is also read: it is the input {read[identity]}",
                "choose another name for the output",
            )


def _identity(path: Path) -> _Identity | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError):
        return None
    return status.st_dev, status.st_ino
