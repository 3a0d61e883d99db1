from pathlib import Path

import pytest

from formats.errors import OutputError
from formats.files.partial_file import new_file, partial_path, write_file


def test_name_appears_with_the_complete_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with new_file(path) as file:
        file.write_at(b"new", 0)
        assert not path.exists()
        assert partial_path(path).exists()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_error_keeps_the_old_file_and_removes_the_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write_at(b"ne", 0)
        raise ZeroDivisionError
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_whole_file_appears_at_once(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    write_file(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"new")]


def test_stale_partial_file_is_overwritten(tmp_path: Path) -> None:
    partial_path(tmp_path / "a").write_bytes(b"longer than the new bytes")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_link_in_place_of_the_partial_file_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    partial_path(tmp_path / "a").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="symbolic link"):
        write_file(tmp_path / "a", b"new")
    assert partial_path(tmp_path / "a").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"mine"
