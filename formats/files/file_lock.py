"""Locks between processes, also on file systems without locks."""

import errno
import fcntl
from pathlib import Path

from formats.files.io_errors import UNSUPPORTED, translated
from formats.files.log_once import warn_once

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}


def lock_file(descriptor: int, path: Path, *, wait: bool = False) -> bool:
    """Lock the open file `path` until it is closed.

    Returns False if another process holds the lock and `wait` is false. On a file system without
    locks it returns True, and warns once for each folder. Raises OutputError.
    """
    with translated(path, "locked"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as e:
            if e.errno in _NO_LOCKS:
                warn_once(
                    f"{path.parent}: this file system has no locks ({e.strerror or e}):"
                    " run only one process at a time there"
                )
                return True
            if e.errno in _HELD and not wait:
                return False
            raise
    return True
