"""The folder that a conversion writes to: its owner, its lock, and the files to replace."""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from converter.calibration.calibration_pass import STATE_FOLDER
from converter.output.output_needs import OutputNeeds
from formats import EXPERTS_FOLDER, INDEX_NAME, JOURNAL_NAME, LOCK_NAME
from formats.errors import OutputError
from formats.files.file_lock import lock_file
from formats.files.io_errors import translated
from formats.files.output_file import (
    OutputFile,
    fsync_folder,
    make_folder,
    make_folders,
    refuse_links,
    remove,
)
from formats.files.overlap import refuse_inputs, refuse_overlap

SOURCE_FOLDER = ".moe-convert.source"
"""Subfolder with a Hub repository's shards while they are needed."""

_log = logging.getLogger(__name__)


class OutputFolder:
    """The folder `path`, created if it does not exist, and locked until `close`.

    Raises what `check_output` raises, and OutputError if another process holds the lock.
    """

    def __init__(self, path: Path, needs: OutputNeeds, *, force: bool = False) -> None:
        check_output(path, needs, force=force)
        self.path = path
        self._needs = needs
        make_folders(path)
        # The lock file marks the folder as ours, so it is durable before any other file.
        self._lock = _lock(path)
        try:
            fsync_folder(path)
            make_folder(path / EXPERTS_FOLDER)
        except BaseException:
            self._lock.close()
            raise

    @property
    def complete(self) -> bool:
        """True if the index exists: the conversion is complete."""
        return (self.path / INDEX_NAME).exists()

    def discard(self) -> None:
        """Remove the files that this conversion will write, complete and partial, the index first.

        Everything else stays; the log warns of files that stay beside the experts.
        """
        remove(self.path / INDEX_NAME)
        # Without the index nobody takes the rest for a complete folder, also after a power loss.
        fsync_folder(self.path)
        remove(self.path / JOURNAL_NAME)
        self._discard_state()
        for name in sorted(self._needs.names | self._needs.partial_names):
            remove(self.path / name)
        experts = self.path / EXPERTS_FOLDER
        if others := sorted(path.name for path in experts.iterdir()):
            _log.warning(
                "%s: %d files are not of this conversion and stay: %s",
                experts,
                len(others),
                others[0],
            )

    def close(self) -> None:
        """Release the lock; remove journal and lock file if the conversion is complete."""
        try:
            if self.complete:
                self._discard_state()
                for name in (JOURNAL_NAME, LOCK_NAME):
                    remove(self.path / name)
        finally:
            self._lock.close()

    def _discard_state(self) -> None:
        for name in (STATE_FOLDER, SOURCE_FOLDER):
            # rmtree would open a FIFO of that name, and block.
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name, ignore_errors=True)


def check_output(path: Path, needs: OutputNeeds, *, force: bool = False) -> None:
    """Raise OutputError if the conversion must not write to `path`; nothing is written.

    - `path` is not a folder.
    - `path` and the source overlap, or an input would be replaced, even with `force`.
    - A file or folder to write to is a symbolic link.
    - Without `force`: it has files, and none shows that moe-convert wrote the folder.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file", "choose another --out-dir")
    refuse_overlap(path, needs.source, "the source")
    refuse_inputs((path / name for name in needs.names | needs.partial_names), needs.inputs)
    with translated(path, "read"):
        # A complete file is renamed into place, which replaces a link of its name.
        refuse_links(
            path, {LOCK_NAME, JOURNAL_NAME, STATE_FOLDER, SOURCE_FOLDER} | needs.partial_names
        )
        if path.exists() and not force and not _is_ours(path, needs):
            raise OutputError(
                f"{path} has files that moe-convert did not write",
                "choose another --out-dir, or add --force: it replaces files of the names that are"
                " written, no others",
            )


def _is_ours(path: Path, needs: OutputNeeds) -> bool:
    """True if moe-convert wrote the folder, or if it is empty."""
    if any((path / name).exists() for name in (INDEX_NAME, JOURNAL_NAME, LOCK_NAME)):
        return True
    # A power loss may leave partial files without lock and journal.
    return all(_is_begun(entry.name, path, needs) for entry in path.iterdir())


def _is_begun(name: str, path: Path, needs: OutputNeeds) -> bool:
    if name != EXPERTS_FOLDER:
        return name in needs.partial_names
    return all(f"{name}/{file}" in needs.partial_names for file in _names_in(path / name))


def _names_in(path: Path) -> Iterable[str]:
    return os.listdir(path) if path.is_dir() else [""]


def _lock(path: Path) -> OutputFile:
    """Return the locked lock file; OutputError if another process holds it."""
    while True:
        lock = OutputFile(path / LOCK_NAME, keep=True)
        try:
            if not lock_file(lock.fileno(), lock.path):
                raise OutputError(
                    f"another process is writing to {path}", "wait for it, or stop it"
                )
            if _has_name(lock):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


def _has_name(lock: OutputFile) -> bool:
    """True if the locked file still has its name: a writer that ended may have removed it."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.lstat(lock.path))
    except FileNotFoundError:
        return False
