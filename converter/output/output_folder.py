"""The folder that a conversion writes to: whose it is, and that only one process writes."""

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
"""Holds a Hub repository's shards while they are needed."""

_log = logging.getLogger(__name__)


class OutputFolder:
    """`path`, created if need be and locked until `close`.

    Raises what `check_output` raises, and OutputError if another process has the lock.
    """

    def __init__(self, path: Path, needs: OutputNeeds, *, force: bool = False) -> None:
        check_output(path, needs, force=force)
        self.path = path
        self._needs = needs
        make_folders(path)
        # The lock says whose folder it is, so its name is durable before any other.
        self._lock = _lock(path)
        try:
            fsync_folder(path)
            make_folder(path / EXPERTS_FOLDER)
        except BaseException:
            self._lock.close()
            raise

    @property
    def complete(self) -> bool:
        """Whether the index is there, and so the conversion complete."""
        return (self.path / INDEX_NAME).exists()

    def discard(self) -> None:
        """Removes the files that this conversion will write, under their names and partial ones:
        the index first.

        Everything else stays; a line in the log names files that stay beside the experts.
        """
        remove(self.path / INDEX_NAME)
        # Without the index nobody takes what is left for complete, also after a power loss.
        fsync_folder(self.path)
        remove(self.path / JOURNAL_NAME)
        self._discard_state()
        for name in sorted(self._needs.names | self._needs.partial_names):
            remove(self.path / name)
        if others := sorted(p.name for p in (self.path / EXPERTS_FOLDER).iterdir()):
            place = self.path / EXPERTS_FOLDER
            _log.warning(
                "%s: %d files are not of this conversion and stay: %s",
                place,
                len(others),
                others[0],
            )

    def close(self) -> None:
        """Gives the lock up; a complete conversion has neither journal nor lock beside it."""
        try:
            if self.complete:
                self._discard_state()
                for name in (JOURNAL_NAME, LOCK_NAME):
                    remove(self.path / name)
        finally:
            self._lock.close()

    def _discard_state(self) -> None:
        for name in (STATE_FOLDER, SOURCE_FOLDER):
            # rmtree opens what it is given, and a FIFO blocks.
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name, ignore_errors=True)


def check_output(path: Path, needs: OutputNeeds, *, force: bool = False) -> None:
    """Refuses an out folder before anything is written.

    OutputError if `path` is no folder; if it and the source are one folder or one lies in the
    other, or if an input would be replaced, whatever `force` says; if something in it that would be
    written to is a symbolic link; and without `force`, if it has files and none of them says that
    moe-convert wrote it.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file", "choose another --out-dir")
    refuse_overlap(path, needs.source, "the source")
    refuse_inputs((path / name for name in needs.names | needs.partial_names), needs.inputs)
    with translated(path, "read"):
        # A link with the name of a complete file is replaced itself.
        refuse_links(
            path, {LOCK_NAME, JOURNAL_NAME, STATE_FOLDER, SOURCE_FOLDER} | needs.partial_names
        )
        if path.exists() and not force and not _is_ours(path, needs):
            raise OutputError(
                f"{path} has files that moe-convert did not write",
                "choose another --out-dir, or add --force: it replaces files of the names that are written, no others",
            )


def _is_ours(path: Path, needs: OutputNeeds) -> bool:
    """True if moe-convert wrote there, or nobody did. A power loss may leave partial files without
    lock and journal.
    """
    if any((path / name).exists() for name in (INDEX_NAME, JOURNAL_NAME, LOCK_NAME)):
        return True
    return all(_is_begun(entry.name, path, needs) for entry in path.iterdir())


def _is_begun(name: str, path: Path, needs: OutputNeeds) -> bool:
    if name != EXPERTS_FOLDER:
        return name in needs.partial_names
    return all(f"{name}/{file}" in needs.partial_names for file in _names_in(path / name))


def _names_in(path: Path) -> Iterable[str]:
    return os.listdir(path) if path.is_dir() else [""]


def _lock(path: Path) -> OutputFile:
    """The locked lock file; OutputError if another process has it."""
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
    """False if a writer that ended in between removed the file that was just locked."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.lstat(lock.path))
    except FileNotFoundError:
        return False
