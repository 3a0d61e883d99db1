"""Translation of operating system errors: file, failed operation, cause, and the next step."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from formats.errors import DoesNotFitError, MoeConvertError, OutputError

UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, 524})
"""Errors of a call that the file system does not support. 524 is the kernel's internal ENOTSUPP,
which some file systems return to programs.
"""

_NO_SPACE = {errno.ENOSPC: "no space left", errno.EDQUOT: "the disk quota is used up"}
AGAIN = "run the same command again"
_HINTS = {
    errno.EIO: f"check the disk and the system's log (dmesg), then {AGAIN}",
    errno.ESTALE: f"mount the network file system again, then {AGAIN}",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "check the permissions of the file and its folder",
    errno.EPERM: "check the permissions of the file and its folder",
    errno.EMFILE: f"allow more open files (ulimit -n) and {AGAIN}",
    errno.ENFILE: f"close other programs, or allow more open files, then {AGAIN}",
    errno.ENODEV: "the file system has no memory maps: read with --io direct",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "name a file instead of a folder",
}


def io_error(
    error: OSError, path: Path | str, done: str, kind: type[MoeConvertError] = OutputError
) -> MoeConvertError:
    """Return `error` as a DoesNotFitError if the disk is full, else as `kind`.

    path: the file to name, unless `error` names one. done: the failed operation as a participle,
    such as "read" or "written".
    """
    code = error.errno or 0
    path = error.filename if isinstance(error.filename, str) else path
    if code in _NO_SPACE:
        folder = path if os.path.isdir(path) else Path(path).parent
        return DoesNotFitError(f"{path}: {_NO_SPACE[code]} in {folder}", f"free space and {AGAIN}")
    if code == errno.EFBIG:
        return DoesNotFitError(
            f"{path}: the file system or a limit (ulimit -f) allows no file of this size",
            "choose a place on another file system",
        )
    if code == errno.ELOOP:
        return kind(f"{path} is a symbolic link, which is never followed here", "remove the link")
    name = errno.errorcode.get(code, "")
    cause = os.strerror(code) if code else str(error)
    return kind(
        f"{path}: cannot be {done}: {cause}{f' ({name})' if name else ''}",
        _HINTS.get(code) or kind.default_hint or AGAIN,
    )


@contextlib.contextmanager
def translated(
    path: Path | str, done: str, kind: type[MoeConvertError] = OutputError
) -> Iterator[None]:
    """Raise every OSError of the block as `io_error` returns it."""
    try:
        yield
    except OSError as e:
        raise io_error(e, path, done, kind) from e
