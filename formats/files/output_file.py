"""Files that are written: never through links, with errors that name them; folders and names made
durable.
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from formats.errors import OutputError
from formats.files.io_errors import UNSUPPORTED, translated

_log = logging.getLogger(__name__)


class OutputFile:
    """The file `path`, open for reading and writing; several threads may use it.

    Without `keep` it begins empty, with `keep` it has what was there. Raises OutputError for a
    symbolic link, a file with several hard links (its bytes are somebody else's too) and anything
    but a regular file; of every call, DoesNotFitError where the disk is full and OutputError for
    other errors of the system.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        with translated(path, "opened for writing"):
            # O_NONBLOCK: a FIFO is refused below, and must not block here.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                what = (
                    "is not a regular file"
                    if not stat.S_ISREG(status.st_mode)
                    else "has other hard links"
                )
                raise OutputError(f"{path} {what}, and would be written to", "remove it")
            if not keep:
                self.truncate(0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    @property
    def size_bytes(self) -> int:
        """Where the file ends now."""
        with translated(self.path, "read"):
            return os.fstat(self._descriptor).st_size

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` from `offset` on; not yet durable (`sync`)."""
        view = memoryview(data)
        with translated(self.path, "written"):
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def read_at(self, n_bytes: int, offset: int) -> bytes:
        """Bytes from `offset` on; fewer where the file ends."""
        parts = []
        with translated(self.path, "read"):
            while n_bytes and (part := os.pread(self._descriptor, n_bytes, offset)):
                parts.append(part)
                n_bytes, offset = n_bytes - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def truncate(self, size_bytes: int) -> None:
        """Cuts or extends the file."""
        with translated(self.path, "written"):
            os.ftruncate(self._descriptor, size_bytes)

    def allocate(self, size_bytes: int) -> None:
        """Extends the file with disk space for all of it, so that a full disk shows now; where the
        file system cannot reserve space, without.
        """
        with translated(self.path, "written"):
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(self._descriptor, 0, size_bytes)
                    return
                except OSError as e:
                    if e.errno not in UNSUPPORTED | {errno.EINVAL}:
                        raise
                    _note(self.path.parent, "space cannot be reserved", e.strerror or str(e))
            os.ftruncate(self._descriptor, size_bytes)

    def sync(self) -> None:
        """Makes what was written durable."""
        with translated(self.path, "written"):
            os.fsync(self._descriptor)

    def finish(self, path: Path) -> None:
        """Gives the complete file the name `path`, durably, and closes it."""
        self.sync()
        self.close()
        rename(self.path, path)

    def close(self) -> None:
        """Closes the file and keeps it."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # NFS and quotas report the failure of earlier writes here.
            with translated(self.path, "written"):
                os.close(descriptor)


def rename(path: Path, new: Path) -> None:
    """Gives the file `path` the name `new`, durably, in place of what has that name."""
    with translated(new, "written"):
        os.replace(path, new)
    fsync_folder(new.parent)


def remove(path: Path) -> None:
    """Removes a file, or a link itself; nothing to do where there is none."""
    with translated(path, "removed"):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder whose name is ours, durably, if it is not there; OutputError if there is a
    link or a file.
    """
    with translated(path, "made"):
        try:
            os.mkdir(path)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                what = (
                    "a symbolic link, which is never followed there"
                    if path.is_symlink()
                    else "not a folder"
                )
                raise OutputError(f"{path} is {what}", "remove it") from None
            return
    fsync_folder(path.parent)


def make_folders(path: Path) -> None:
    """Makes a folder that the user named, and those around it, durably; links are followed."""
    if not path.is_dir():
        if path.parent != path:
            make_folders(path.parent)
        with translated(path, "made"):
            path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """OutputError if one of `names` in `folder`, or a folder on its way, is a symbolic link, which
    a write follows.
    """
    places = {place for name in names for place in (Path(name), *Path(name).parents) if place.name}
    for place in sorted(places):
        if (folder / place).is_symlink():
            raise OutputError(
                f"{folder / place} is a symbolic link, which is never followed there",
                "remove the link",
            )


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable, where the file system can."""
    with translated(folder, "written"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as e:
            # Not EROFS: a file system that became read-only has lost the names.
            if e.errno not in UNSUPPORTED | {errno.EINVAL, errno.EBADF}:
                raise
            _note(
                folder,
                "folders cannot be synced: a power loss may lose files",
                e.strerror or str(e),
            )
        finally:
            os.close(descriptor)


@functools.cache
def _note(folder: Path, what: str, cause: str) -> None:
    _log.info("%s: on this file system %s (%s)", folder, what, cause)
