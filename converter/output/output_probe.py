"""What an out folder's file system must be able to do, tried before the first weight is read."""

import errno
import os
import tempfile
from pathlib import Path

from converter.output.output_folder import check_output
from converter.output.output_needs import OutputNeeds
from formats.errors import DoesNotFitError, OutputError
from formats.files.file_lock import lock_file
from formats.files.io_errors import translated

_SPARE_INODES = 8
"""Lock, journal, the folders, and files of the conversion's state."""


def probe_output(path: Path, needs: OutputNeeds, *, force: bool = False) -> None:
    """Raises what would stop a conversion to `path` at its beginning or later; leaves nothing
    behind.

    Checks what `check_output` checks, lengths of names, free inodes, and with a temporary file,
    which is removed at
    once: permission to write, the largest file's size, locks. DoesNotFitError, OutputError. Without
    locks it warns.
    """
    # os.path.exists is also False where a name is too long.
    folder = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file", "choose another --out-dir")
    _check_names(path, folder, needs)
    check_output(path, needs, force=force)
    with translated(path, "written"):
        _check_inodes(path, folder, needs)
        # Without a name where the system can: a kill leaves nothing behind.
        with tempfile.TemporaryFile(dir=folder, prefix=".moe-convert.probe-", buffering=0) as file:
            _check_size(path, file.fileno(), needs.largest_file_bytes)
            if not lock_file(file.fileno(), folder / ".moe-convert.probe"):
                raise OutputError(
                    f"{path}: a new file there is locked by somebody else",
                    "choose another --out-dir",
                )


def _check_names(path: Path, folder: Path, needs: OutputNeeds) -> None:
    try:
        longest_name, longest_path = (
            os.pathconf(folder, "PC_NAME_MAX"),
            os.pathconf(folder, "PC_PATH_MAX"),
        )
    except (OSError, ValueError):
        return
    for name in needs.names | needs.partial_names:
        whole = path.absolute() / name
        part = max(whole.parts, key=lambda part: len(os.fsencode(part)))
        if 0 < longest_name < len(os.fsencode(part)):
            raise OutputError(
                f"{path}: the file system allows names of {longest_name} bytes: {part}",
                "shorten it",
            )
        # The system counts the zero behind the path.
        if 0 < longest_path <= len(os.fsencode(whole)):
            what = f"{whole}: the system allows paths of {longest_path - 1} bytes"
            raise OutputError(what, "choose an --out-dir with a shorter path")


def _check_inodes(path: Path, folder: Path, needs: OutputNeeds) -> None:
    status = os.statvfs(folder)
    wanted = _SPARE_INODES + sum(not (path / name).exists() for name in needs.names)
    # Some file systems make inodes as they need them, and count none.
    if status.f_files and status.f_favail < wanted:
        raise DoesNotFitError(
            f"{path}: the conversion makes {wanted} files, and the file system has room for {status.f_favail} (inodes)",
            "remove files there, or choose another disk",
        )


def _check_size(path: Path, descriptor: int, n_bytes: int) -> None:
    """Positions behind the file system's largest size are refused; FAT ends at 4 GiB."""
    try:
        os.lseek(descriptor, n_bytes, os.SEEK_SET)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW):
            raise
        raise DoesNotFitError(
            f"{path}: the file system has no files of {n_bytes} bytes, the largest of the conversion",
            "choose a disk with another file system",
        ) from None
