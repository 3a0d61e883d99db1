"""Locks between processes, and file systems that have none."""

import errno
import fcntl
import functools
import logging
from pathlib import Path

from formats.files.io_errors import UNSUPPORTED, translated

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_LACKING = UNSUPPORTED | {errno.ENOLCK}

_log = logging.getLogger(__name__)


def lock_file(descriptor: int, path: Path, *, wait: bool = False) -> bool:
    """Locks the open file `path` until it is closed; False if another process has the lock (never
    with `wait`).

    Where the file system has no locks, warns once for each folder and returns True.
    """
    with translated(path, "locked"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as e:
            if e.errno in _LACKING:
                _warn(path.parent, e.strerror or str(e))
                return True
            if e.errno in _HELD and not wait:
                return False
            raise
    return True


@functools.cache
def _warn(folder: Path, cause: str) -> None:
    _log.warning(
        "%s: no locks on this file system (%s): run only one process at a time there", folder, cause
    )
