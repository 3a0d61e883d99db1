"""The folder that a conversion writes to: whose it is, and that only one process writes."""

import fcntl
import os
import shutil
from pathlib import Path

from converter.calibration import discard_state
from converter.journal import JOURNAL_NAME
from formats import EXPERTS_FOLDER, INDEX_NAME
from formats.errors import OutputError

LOCK_NAME = ".moe-convert.lock"
SOURCE_FOLDER = ".moe-convert.source"
"""Holds a Hub repository's shards while they are needed."""


class OutputFolder:
    """`path`, created if need be and locked until `close`.

    Raises OutputError if another process has the lock, or if the folder has files and none of them says that
    moe-convert wrote it (unless `force`).
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file", "choose another --out-dir")
        if path.exists() and not force and not self._ours() and any(path.iterdir()):
            raise OutputError(
                f"{path} has files that moe-convert did not write",
                "choose another --out-dir, or add --force to write there",
            )
        (path / EXPERTS_FOLDER).mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path)

    @property
    def complete(self) -> bool:
        """Whether the index is there, and so the conversion complete."""
        return (self.path / INDEX_NAME).exists()

    def discard(self) -> None:
        """Forgets what was converted: index first, then journal, experts and partial files. Other files stay."""
        for name in (INDEX_NAME, JOURNAL_NAME):
            (self.path / name).unlink(missing_ok=True)
        self._discard_state()
        for file in (*self.path.glob(f"{EXPERTS_FOLDER}/layer-*"), *self.path.glob("trunk.safetensors*")):
            file.unlink()

    def close(self) -> None:
        """Gives the lock up; a complete conversion has neither journal nor lock beside it."""
        if self.complete:
            self._discard_state()
            for name in (JOURNAL_NAME, LOCK_NAME):
                (self.path / name).unlink(missing_ok=True)
        os.close(self._lock)

    def _discard_state(self) -> None:
        discard_state(self.path)
        shutil.rmtree(self.path / SOURCE_FOLDER, ignore_errors=True)

    def _ours(self) -> bool:
        return any((self.path / name).exists() for name in (INDEX_NAME, JOURNAL_NAME, LOCK_NAME))


def _lock(path: Path) -> int:
    """The descriptor of the locked lock file; OutputError if another process has it."""
    while True:
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that ended in between may have removed the file that was just locked.
            if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK_NAME)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise OutputError(f"another process is writing to {path}", "wait for it, or stop it") from None
        os.close(descriptor)
