"""Checks of untrusted file names, and safe opening of their files."""

import difflib
import os
import re
import shlex
import stat
from pathlib import Path

from formats.errors import DamageError, PathError, SourceError
from formats.files.io_errors import io_error, translated

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@ -]*")


def check_name(name: str, where: str) -> str:
    """Return `name` if it is a plain relative path, else raise PathError with `where`.

    Components consist of letters, digits and `._+=@ -`, do not begin with a dot, and are joined by
    `/`. This excludes `..`, absolute paths, backslashes, drives, `%2e` and NUL.
    """
    good = 0 < len(name) <= 512 and all(_COMPONENT.fullmatch(part) for part in name.split("/"))
    if not good:
        raise PathError(
            f"{where}: file name {name!r} is not a plain relative path",
            "get the folder again from where it was published",
        )
    return name


def locate(folder: Path, name: str, where: str) -> Path:
    """Return the real path of the regular file `name` in `folder`.

    Raises DamageError if the file is missing; PathError for an unsafe name, a symbolic link that
    leaves the folder, and anything but a regular file. In a snapshot of a Hub cache, links into the
    cache's `blobs` are allowed.
    """
    check_name(name, where)
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(root) and not _in_blobs_of_cache(root, path):
        raise PathError(
            f"{where}: {name} is a symbolic link to {path}, outside of {root}",
            "copy the file into the folder",
        )
    return _regular(path, folder, name, where)


def locate_source(folder: Path, name: str, where: str) -> Path:
    """Return the real path of the regular file `name` in the checkpoint `folder`.

    The user's own links are followed to any place. A snapshot of a Hub cache has a stranger's
    files: there the rules of `locate` apply. Raises the errors of `locate`.
    """
    if _hub_cache_entry(Path(os.path.realpath(folder))):
        return locate(folder, name, where)
    check_name(name, where)
    return _regular(Path(os.path.realpath(folder / name)), folder, name, where)


def _regular(path: Path, folder: Path, name: str, where: str) -> Path:
    """Return `path`, the resolved `name` in `folder`, if it is a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        link = f" (it is a link to {path})" if os.path.islink(folder / name) else ""
        raise DamageError(
            f"{where}: file {name} is missing in {folder}{link}",
            "get the file again, or convert again",
        ) from None
    except OSError as e:
        raise io_error(e, folder / name, "read", PathError) from None
    if not stat.S_ISREG(mode):
        raise PathError(f"{where}: {name} in {folder} is not a regular file")
    return path


def similar_folders(path: Path) -> list[str]:
    """Return existing folders with names similar to the first missing part of `path`."""
    while not path.parent.is_dir():
        path = path.parent
    try:
        names = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]


def open_regular(path: Path) -> int:
    """Open `path` for reading and return its descriptor, which the caller closes.

    Raises PathError for anything but a regular file; a FIFO does not block.
    """
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        )
    except OSError as e:
        raise io_error(e, path, "opened", PathError) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PathError(f"{path} is not a regular file")
    return descriptor


def read_small(folder: Path, name: str, where: str, *, max_bytes: int = 16 << 20) -> bytes:
    """Return the bytes of a file in `folder`. Raises DamageError if it exceeds `max_bytes`."""
    return _read_at_most(locate(folder, name, where), name, where, max_bytes)


def read_small_source(folder: Path, name: str, where: str, *, max_bytes: int = 16 << 20) -> bytes:
    """Return the bytes of a file in the checkpoint `folder`, found by `locate_source`.

    Raises DamageError if it exceeds `max_bytes`, and SourceError if it is a git-lfs pointer.
    """
    path = locate_source(folder, name, where)
    data = _read_at_most(path, name, where, max_bytes)
    check_no_pointer(data, folder / name)
    return data


def check_no_pointer(beginning: bytes, path: Path) -> None:
    """Raise SourceError if `beginning`, the first bytes of `path`, is that of a git-lfs pointer."""
    if problem := lfs_problem(beginning, path):
        raise SourceError(f"{path} {problem[0]}", problem[1])


def lfs_problem(beginning: bytes, path: Path) -> tuple[str, str] | None:
    """Return (problem, next step) if the file at `path` is a git-lfs pointer, else None.

    beginning: the first bytes of the file.
    """
    if not beginning.startswith(LFS_POINTER):
        return None
    where = shlex.quote(str(path.parent))
    return (
        "is a git-lfs pointer: the file itself was not fetched",
        f"git -C {where} lfs pull  # where git has no lfs, install git-lfs first",
    )


def _read_at_most(path: Path, name: str, where: str, max_bytes: int) -> bytes:
    with translated(path, "read", PathError), os.fdopen(open_regular(path), "rb") as f:
        data = f.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DamageError(f"{where}: {name} has over {max_bytes} bytes")
    return data


def _hub_cache_entry(root: Path) -> Path | None:
    """Return the cache's folder of a repository if `root` is a snapshot in it, else None."""
    entry = root.parent.parent
    return entry if root.parent.name == "snapshots" and "--" in entry.name else None


def _in_blobs_of_cache(root: Path, path: Path) -> bool:
    """True if `root` is a snapshot of a Hub cache, and `path` is a blob of its repository or cache.

    huggingface_hub 2 stores blobs of several repositories as `<cache>/blobs/<2 digits>/<64
    digits>`. Both blobs folders may be links to another disk.
    """
    entry = _hub_cache_entry(root)
    if entry is None:
        return False
    if path.parent == Path(os.path.realpath(entry / "blobs")):
        return True
    common = Path(os.path.realpath(entry.parent / "blobs"))
    shared = path.relative_to(common) if path.is_relative_to(common) else None
    return (
        shared is not None
        and re.fullmatch("([0-9a-f]{2})/\\1[0-9a-f]{62}", shared.as_posix()) is not None
    )
