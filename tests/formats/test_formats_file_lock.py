"""File locks: a lock held by another process differs from a file system without locks."""

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest

from formats.errors import OutputError
from formats.files.file_lock import lock_file
from formats.files.output_file import OutputFile


def test_held_lock_is_not_taken(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "lock") as one, OutputFile(tmp_path / "lock", keep=True) as other:
        assert lock_file(one.fileno(), one.path)
        assert not lock_file(other.fileno(), other.path)


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def test_file_system_without_locks_is_warned_of_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: int,
    wait: bool,
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), OutputFile(tmp_path / "lock") as lock:
        assert lock_file(lock.fileno(), lock.path, wait=wait)
        assert lock_file(lock.fileno(), lock.path, wait=wait)
    assert caplog.text.count("this file system has no locks") == 1


def test_other_error_names_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        OutputFile(tmp_path / "lock") as lock,
        pytest.raises(OutputError, match=r"lock: cannot be locked: .*EIO"),
    ):
        lock_file(lock.fileno(), lock.path)
