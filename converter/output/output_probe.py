"""Probes the file system of an out folder before the first weight is read."""

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
"""Upper estimate for lock, journal, folders, and the conversion's state."""


def probe_output(path: Path, needs: OutputNeeds, *, force: bool = False) -> None:
    """Raise the errors that would stop a conversion to `path` later; leave nothing behind.

    Checks what `check_output` checks, lengths of names and free inodes. With a temporary file,
    removed at once, it checks permission to write, the largest file's size, and locks. Raises
    DoesNotFitError, OutputError; a file system without locks only gives a warning.
    """
    # os.path.exists is also False where a name is too long.
    folder = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file", "choose another --out-dir")
    _check_names(path, folder, needs)
    check_output(path, needs, force=force)
    with translated(path, "written"):
        _check_inodes(path, folder, needs)
        # TemporaryFile has no name where the system allows it: a kill leaves nothing behind.
        with tempfile.TemporaryFile(dir=folder, prefix=".moe-convert.probe-", buffering=0) as file:
            _check_size(path, file.fileno(), needs.largest_file_bytes)
            if not lock_file(file.fileno(), folder / ".moe-convert.probe"):
                raise OutputError(
                    f"{path}: a new file there is locked by somebody else",
                    "choose another --out-dir",
                )


def _check_names(path: Path, folder: Path, needs: OutputNeeds) -> None:
    """Raise OutputError if a file's name or path is too long for the file system."""
    try:
        max_name_bytes = os.pathconf(folder, "PC_NAME_MAX")
        max_path_bytes = os.pathconf(folder, "PC_PATH_MAX")
    except (OSError, ValueError):
        return
    for name in needs.names | needs.partial_names:
        full_path = path.absolute() / name
        longest = max(full_path.parts, key=lambda part: len(os.fsencode(part)))
        if 0 < max_name_bytes < len(os.fsencode(longest)):
            raise OutputError(
                f"{path}: the file system allows names of {max_name_bytes} bytes: {longest}",
                "shorten it",
            )
        # The system's limit includes the zero after the path.
        if 0 < max_path_bytes <= len(os.fsencode(full_path)):
            raise OutputError(
                f"{full_path}: the system allows paths of {max_path_bytes - 1} bytes",
                "choose an --out-dir with a shorter path",
            )


def _check_inodes(path: Path, folder: Path, needs: OutputNeeds) -> None:
    """Raise DoesNotFitError if the file system has too few free inodes."""
    status = os.statvfs(folder)
    new_files = _SPARE_INODES + sum(not (path / name).exists() for name in needs.names)
    # A file system that allocates inodes on demand reports a total of 0.
    if status.f_files and status.f_favail < new_files:
        raise DoesNotFitError(
            f"{path}: the conversion makes {new_files} files, and the file system has room for"
            f" {status.f_favail} (inodes)",
            "remove files there, or choose another disk",
        )


def _check_size(path: Path, descriptor: int, n_bytes: int) -> None:
    """Raise DoesNotFitError if the file system allows no file of `n_bytes`; FAT ends at 4 GiB."""
    try:
        # lseek refuses positions beyond the file system's largest size.
        os.lseek(descriptor, n_bytes, os.SEEK_SET)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW):
            raise
        raise DoesNotFitError(
            f"{path}: the file system allows no file of {n_bytes} bytes, the largest of the"
            " conversion",
            "choose a disk with another file system",
        ) from None
