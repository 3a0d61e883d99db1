"""File names from strangers."""

import os
from pathlib import Path

import pytest

from formats.errors import DamageError, PathError
from formats.files.paths import check_name, locate, locate_source, open_regular, read_small


@pytest.mark.parametrize(
    "name", ["a", "model-00001-of-00019.safetensors", "experts/layer-000.safetensors", "_a b+c@d=e"]
)
def test_plain_name_is_taken(name: str) -> None:
    assert check_name(name, "here") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/..",
        "/a",
        "//a",
        "a//b",
        "a/",
        "./a",
        "a\\b",
        "..\\a",
        "C:\\a",
        "C:a",
        "\\\\host\\a",
        "%2e%2e/a",
        "%2E%2E%2Fa",
        "a\0",
        "a\n",
        "\ta",
        "~/a",
        "-rf",
        ".hidden",
        "a/.git",
        "a\u202eb",
        "ａ",
        "\ud800",
        "a" * 513,
    ],
)
def test_unsafe_name_is_refused_with_where_it_stood(name: str) -> None:
    with pytest.raises(PathError, match=r"weight_map: file name ") as caught:
        check_name(name, "weight_map")
    assert repr(name) in caught.value.message
    assert caught.value.hint


def test_component_that_is_too_long_for_the_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="too long"):
        locate(tmp_path, "a" * 300, "here")


def test_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(PathError, match="a/b"):
        locate(tmp_path, "a/b", "here")


def test_missing_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="here: file a is missing in"):
        locate(tmp_path, "a", "here")


def test_dangling_link_inside_the_folder_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    with pytest.raises(DamageError, match="here: file a is missing in"):
        locate(tmp_path, "a", "here")


def test_folder_reached_through_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert read_small(tmp_path / "link", "a", "here") == b"x"


def test_folder_whose_name_begins_alike_is_outside(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model-evil").mkdir()
    (tmp_path / "model-evil/a").write_bytes(b"x")
    (tmp_path / "model/a").symlink_to("../model-evil/a")
    with pytest.raises(PathError, match="outside of"):
        locate(tmp_path / "model", "a", "here")


def test_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(PathError, match="is not a regular file"):
        open_regular(tmp_path / "a")


def test_device_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="is not a regular file"):
        open_regular(Path("/dev/zero"))


def test_file_that_cannot_be_opened_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="cannot be opened: No such file"):
        open_regular(tmp_path / "gone")


def test_file_over_the_limit_is_refused_with_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    with pytest.raises(DamageError, match="a has over 10 bytes"):
        read_small(tmp_path, "a", "here", max_bytes=10)
    assert read_small(tmp_path, "a", "here", max_bytes=11) == bytes(11)


@pytest.mark.parametrize(
    ("blob", "taken"), [("blobs/ab/ab" + "0" * 62, True), ("blobs/ab/cd" + "0" * 62, False)]
)
def test_blobs_that_repositories_of_a_hub_cache_share_are_followed(
    tmp_path: Path, blob: str, taken: bool
) -> None:
    snapshot = tmp_path / "models--me--model/snapshots/0123abc"
    for folder in (snapshot, snapshot.parent.parent / "blobs", (tmp_path / blob).parent):
        folder.mkdir(parents=True)
    (tmp_path / blob).write_bytes(b"x")
    (snapshot.parent.parent / "blobs/etag").symlink_to(Path("../..") / blob)
    (snapshot / "a").symlink_to("../../blobs/etag")
    if taken:
        assert read_small(snapshot, "a", "here") == b"x"
    else:
        with pytest.raises(PathError, match="outside of"):
            locate(snapshot, "a", "here")


def test_link_of_the_users_own_checkpoint_is_followed_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a").write_bytes(b"x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a").symlink_to(tmp_path / "disk/a")
    assert locate_source(tmp_path / "model", "a", "here") == tmp_path / "disk/a"


def test_unsafe_name_in_the_users_own_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(PathError, match="not a plain relative path"):
        locate_source(tmp_path / "model", "../a", "here")


def test_dangling_link_of_a_checkpoint_is_named_with_its_target(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/gone/a")
    with pytest.raises(DamageError, match=r"file a is missing in .* link to /gone/a"):
        locate_source(tmp_path, "a", "here")


def test_link_out_of_a_snapshot_of_the_hub_is_refused_as_a_source(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--model/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"x")
    (snapshot / "a").symlink_to(tmp_path / "a")
    with pytest.raises(PathError, match="outside of"):
        locate_source(snapshot, "a", "here")


def test_blobs_folder_on_another_disk_is_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--model/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/etag").write_bytes(b"x")
    (snapshot.parent.parent / "blobs").symlink_to(tmp_path / "disk")
    (snapshot / "a").symlink_to("../../blobs/etag")
    assert read_small(snapshot, "a", "here") == b"x"
