"""Reads past the page cache (O_DIRECT), on file systems that support them."""

import errno
import fcntl
import os
from pathlib import Path

from formats import ALIGNMENT_BYTES
from formats.files.io_errors import UNSUPPORTED
from formats.files.log_once import info_once
from formats.files.paths import open_regular
from formats.reading.fork_gate import shared_gate

_REFUSED = UNSUPPORTED | {errno.EINVAL}


class DirectFile:
    """A file read with O_DIRECT, or with ordinary reads if the file system refuses O_DIRECT.

    Ordinary reads are followed by a request to drop the pages from the page cache. Several threads
    may read at once. Raises PathError if `path` cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gate = shared_gate()
        self._descriptor = open_regular(path)
        self._direct = _make_direct(self._descriptor, path)

    def read(self, offset: int, view: memoryview, begin: int, end: int) -> int:
        """Read the file's bytes [offset + begin, offset + end) into view[begin:end].

        Returns the position in `view` at which the read stopped: at least `end`, less only if the
        file ends earlier. O_DIRECT reads whole pages: `offset` and `begin` are multiples of
        ALIGNMENT_BYTES, and `view` begins on a page boundary and extends to the one after `end`
        (`formats.reading.reader.aligned_bytes`). Raises OSError.
        """
        done = begin
        while done < end:
            direct = self._direct
            stop = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES if direct else end
            try:
                with self._gate.read():
                    count = os.preadv(self._descriptor, [view[done:stop]], offset + done)
            except OSError as e:
                # The file system refuses O_DIRECT, or the last read stopped within a page.
                if not direct or e.errno not in _REFUSED:
                    raise
                _make_buffered(self._descriptor)
                self._direct = False
                _note_refusal(self.path.parent, e)
                continue
            if count == 0:
                break
            done += count
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset + begin, end - begin, os.POSIX_FADV_DONTNEED)
        return done

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def _make_direct(descriptor: int, path: Path) -> bool:
    """Set O_DIRECT; return True if reads are now direct, and so must be aligned."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | flag)
    except OSError as e:
        _note_refusal(path.parent, e)
        return False
    return True


def _make_buffered(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _note_refusal(folder: Path, error: OSError) -> None:
    info_once(
        f"{folder}: direct reads are refused ({error.strerror or error}):"
        " reading through the page cache"
    )
