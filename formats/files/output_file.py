"""Durable writes to files and folders, never through links."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from formats.errors import OutputError
from formats.files.io_errors import UNSUPPORTED, translated
from formats.files.log_once import info_once


class OutputFile:
    """The file `path`, open for reading and writing. Several threads may use it.

    keep: keep the bytes of an existing file; else the file begins empty. Raises OutputError for a
    symbolic link, a file with several hard links, and anything but a regular file. Every method
    raises DoesNotFitError if the disk is full, and OutputError for other errors of the system.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        with translated(path, "opened for writing"):
            # O_NONBLOCK: a FIFO is refused below and must not block here.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OutputError(f"{path} is not a regular file: it is not written", "remove it")
            if status.st_nlink > 1:
                raise OutputError(f"{path} has other hard links: it is not written", "remove it")
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
        """Return the file descriptor."""
        return self._descriptor

    @property
    def size_bytes(self) -> int:
        """Current size of the file."""
        with translated(self.path, "read"):
            return os.fstat(self._descriptor).st_size

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`. `sync` makes it durable."""
        view = memoryview(data)
        with translated(self.path, "written"):
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view = view[written:]
                offset += written

    def read_at(self, n_bytes: int, offset: int) -> bytes:
        """Return `n_bytes` from `offset` on; fewer at the end of the file."""
        parts = []
        with translated(self.path, "read"):
            while n_bytes and (part := os.pread(self._descriptor, n_bytes, offset)):
                parts.append(part)
                n_bytes -= len(part)
                offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def truncate(self, size_bytes: int) -> None:
        """Cut the file, or extend it with zeros."""
        with translated(self.path, "written"):
            os.ftruncate(self._descriptor, size_bytes)

    def allocate(self, size_bytes: int) -> None:
        """Extend the file and reserve its disk space, so that a full disk fails now.

        Where the file system cannot reserve space, the file is only extended.
        """
        with translated(self.path, "written"):
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(self._descriptor, 0, size_bytes)
                    return
                except OSError as e:
                    if e.errno not in UNSUPPORTED | {errno.EINVAL}:
                        raise
                    info_once(
                        f"{self.path.parent}: this file system cannot reserve space"
                        f" ({e.strerror or e})"
                    )
            os.ftruncate(self._descriptor, size_bytes)

    def sync(self) -> None:
        """Make all written bytes durable."""
        with translated(self.path, "written"):
            os.fsync(self._descriptor)

    def finish(self, path: Path) -> None:
        """Make the file durable, close it, and rename it to `path`."""
        self.sync()
        self.close()
        rename(self.path, path)

    def close(self) -> None:
        """Close the file, which stays."""
        if self._descriptor >= 0:
            descriptor = self._descriptor
            self._descriptor = -1
            # NFS and quotas report failures of earlier writes here.
            with translated(self.path, "written"):
                os.close(descriptor)


def rename(path: Path, new: Path) -> None:
    """Rename the file `path` to `new` durably. It replaces an existing file."""
    with translated(new, "written"):
        os.replace(path, new)
    fsync_folder(new.parent)


def remove(path: Path) -> None:
    """Remove a file, or a link but not its target. A missing file is no error."""
    with translated(path, "removed"):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a folder durably, unless it exists. The name is ours: links are not followed.

    Raises OutputError if `path` is a link or a file.
    """
    with translated(path, "made"):
        try:
            os.mkdir(path)
        except FileExistsError:
            if path.is_symlink():
                raise _link_error(path) from None
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise OutputError(f"{path} is not a folder", "remove it") from None
            return
    fsync_folder(path.parent)


def make_folders(path: Path) -> None:
    """Create a folder and its parents durably. The user named it: links are followed."""
    if not path.is_dir():
        if path.parent != path:
            make_folders(path.parent)
        with translated(path, "made"):
            path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise OutputError if a file of `names` in `folder`, or a folder above it, is a link.

    For writers that would follow links.
    """
    paths = {path for name in names for path in (Path(name), *Path(name).parents) if path.name}
    for path in sorted(paths):
        if (folder / path).is_symlink():
            raise _link_error(folder / path)


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable, if the file system supports it."""
    with translated(folder, "written"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as e:
            # EROFS is an error: a file system that became read-only has lost the names.
            if e.errno not in UNSUPPORTED | {errno.EINVAL, errno.EBADF}:
                raise
            info_once(
                f"{folder}: this file system cannot sync folders ({e.strerror or e}):"
                " a power loss may lose files"
            )
        finally:
            os.close(descriptor)


def _link_error(path: Path) -> OutputError:
    return OutputError(
        f"{path} is a symbolic link, which is never followed here", "remove the link"
    )
