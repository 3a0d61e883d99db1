"""A file read past the page cache, where the file system can."""

import errno
import fcntl
import functools
import logging
import os
from pathlib import Path

from formats import ALIGNMENT_BYTES
from formats.files.io_errors import UNSUPPORTED
from formats.files.paths import open_regular
from formats.reading.fork_gate import shared_gate

_REFUSED = UNSUPPORTED | {errno.EINVAL}

_log = logging.getLogger(__name__)


class DirectFile:
    """O_DIRECT where the file system takes it; elsewhere ordinary reads, after which the page cache
    is asked to forget.

    Several threads may read at once. PathError if `path` cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gate = shared_gate()
        self._descriptor = open_regular(path)
        self._direct = _make_direct(self._descriptor, path)

    def read(self, offset: int, view: memoryview, begin: int, end: int) -> int:
        """Bytes [begin, end) of what starts at `offset`, to the same places in `view`; where the
        reading stopped: `end` or behind it, less if the file ends before. OSError.

        offset and begin are multiples of ALIGNMENT_BYTES, `view` lies on a page and reaches to the
        next one after `end` (`formats.reading.reader.aligned_bytes`): whole pages are read.
        """
        done = begin
        while done < end:
            direct = self._direct
            stop = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES if direct else end
            try:
                with self._gate.read():
                    count = os.preadv(self._descriptor, [view[done:stop]], offset + done)
            except OSError as e:
                # Not for this file system, or the read before stopped within a page.
                if not direct or e.errno not in _REFUSED:
                    raise
                _make_buffered(self._descriptor)
                self._direct = False
                _note(self.path.parent, e.strerror or str(e))
                continue
            if count == 0:
                break
            done += count
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset + begin, end - begin, os.POSIX_FADV_DONTNEED)
        return done

    def close(self) -> None:
        """Gives up the file."""
        os.close(self._descriptor)


def _make_direct(descriptor: int, path: Path) -> bool:
    """Whether reads of `descriptor` now go past the page cache and so must be aligned."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | flag)
    except OSError as e:
        _note(path.parent, e.strerror or str(e))
        return False
    return True


def _make_buffered(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


@functools.cache
def _note(folder: Path, cause: str) -> None:
    _log.info("%s: direct reads are refused (%s): reading through the page cache", folder, cause)
