"""The output folder: never the source, never through links; only files of the converter change."""

import hashlib
import logging
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from make_checkpoint import SHAPES, make_checkpoint

from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.convert import ConvertOptions, convert_checkpoint
from converter.output.conversion_sizes import plan_output
from converter.output.output_folder import SOURCE_FOLDER
from converter.output.output_needs import OutputNeeds
from converter.output.output_probe import probe_output
from converter.output.source_side_files import check_side_files
from converter.recipe.recipes import make_recipe
from formats.errors import DoesNotFitError, OutputError
from formats.files.output_file import OutputFile
from formats.index import read_index
from formats.layer_file import layer_file_name

JOURNAL = ".moe-convert.journal"
PARTIAL = f"{layer_file_name(0)}.partial"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one layer that has a model card."""
    folder = tmp_path / "models" / "Mini"
    make_checkpoint(folder, SHAPES["mini"], 1)
    (folder / "README.md").write_text("mine")
    return folder


def convert(source: Path | HubModel, out: Path, recipe: str = "2bit", **options: Any) -> str:
    return convert_checkpoint(
        source, out, make_recipe(recipe, solver="hqq"), ConvertOptions(**options)
    ).done


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def needs(source: Path) -> OutputNeeds:
    with Checkpoint(source) as checkpoint:
        plan = plan_output(checkpoint, make_recipe("2bit", solver="hqq"))
        return OutputNeeds.for_plan(checkpoint, plan, check_side_files(source))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "where", ["same", "inside", "deep inside", "around", "link to it", "link inside", "through .."]
)
def test_out_folder_that_overlaps_the_source_is_refused_whatever_the_options(
    model: Path, tmp_path: Path, where: str, force: bool
) -> None:
    (tmp_path / "link").symlink_to(model)
    out = {
        "same": model,
        "inside": model / "out",
        "deep inside": model / "a" / "b",
        "around": model.parent,
        "link to it": tmp_path / "link",
        "link inside": tmp_path / "link" / "out",
        "through ..": model.parent / "Mini" / ".." / "Mini",
    }[where]
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"the source .*, which is only read") as caught:
        convert(model, out, force=force, resume=not force)
    assert "--force" not in str(caught.value)
    assert contents(tmp_path) == before
    assert not (model / "a").exists()


def test_out_folder_that_is_the_source_by_another_mount_or_case_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a bind mount or a file system that ignores case: another path with the same device and
    # inode.
    real, other = os.stat, tmp_path / "models" / "MINI"

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        return real(
            str(path).replace("MINI", "Mini") if isinstance(path, str | Path) else path,
            *args,
            **kwargs,
        )

    monkeypatch.setattr(os, "stat", stat)
    before = contents(tmp_path)
    for out in (other, other / "out"):
        with pytest.raises(OutputError, match="which is only read"):
            convert(model, out, force=True)
    assert contents(tmp_path) == before


def test_input_with_the_name_of_an_output_is_not_replaced(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "out" / "README.md"
    text.parent.mkdir()
    text.write_text("a text to calibrate with")
    with pytest.raises(OutputError, match="is also read"):
        convert_checkpoint(
            model,
            tmp_path / "out",
            make_recipe("2bit", calibrate="file", calibration_tokens=1024),
            ConvertOptions(calibration_file=text, force=True),
        )
    assert contents(tmp_path / "out").keys() == {"README.md"}


def test_force_replaces_what_is_written_and_nothing_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    strangers = [
        "thesis.txt",
        "trunk.safetensors.bak",
        "experts/layer-000.txt",
        "experts/layer-777.safetensors",
    ]
    (out / "experts").mkdir(parents=True)
    for name in (*strangers, "README.md", "config.json", "experts/layer-000.safetensors.partial"):
        (out / name).write_text("theirs")
    convert(model, out, force=True)
    assert [(out / name).read_text() for name in strangers] == ["theirs"] * len(strangers)
    assert contents(out).keys() - set(strangers) == needs(model).names
    assert read_index(out).recipe.name == "2bit"


def test_no_resume_replaces_what_is_written_and_nothing_else(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    convert(model, out, part=(1, 1))
    for name in ("trunk.safetensors.mine", "experts/layer-001.safetensors"):
        (out / name).write_text("theirs")
    with caplog.at_level(logging.WARNING):
        convert(model, out, resume=False)
    assert (out / "trunk.safetensors.mine").read_text() == "theirs"
    assert (out / "experts" / "layer-001.safetensors").read_text() == "theirs"
    assert "1 files are not of this conversion and stay: layer-001.safetensors" in caplog.text


def test_card_that_somebody_wrote_during_the_conversion_is_kept(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(model, out, part=(1, 1))
    (out / "README.md").write_text("mine")
    convert(model, out)
    assert (out / "README.md").read_text() == "mine"
    convert(model, out, force=True)
    assert "moe-convert begin" in (out / "README.md").read_text()


def test_no_resume_leaves_a_complete_conversion(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert convert(model, tmp_path / "out", resume=False) == "already complete"
    with pytest.raises(OutputError, match="--force"):
        convert(model, tmp_path / "out", "3bit", resume=False)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("options", [{}, {"resume": False}, {"force": True}], ids=str)
@pytest.mark.parametrize(
    "name",
    ["experts", SOURCE_FOLDER, ".moe-convert.calibration", JOURNAL, ".moe-convert.lock", PARTIAL,
     "trunk.safetensors.partial", "moe_index.json.partial", "README.md.partial"],
)  # fmt: skip
def test_link_that_a_write_would_follow_is_refused(
    model: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    victim, link = tmp_path / "victim", tmp_path / "out" / name
    is_folder = "." not in Path(name).suffix or name in (SOURCE_FOLDER, ".moe-convert.calibration")
    if is_folder:
        victim.mkdir()
        (victim / "layer-000.safetensors").write_text("theirs")
        (victim / "thesis.txt").write_text("theirs")
    else:
        victim.write_text("theirs")
    link.parent.mkdir(parents=True)
    (tmp_path / "out" / ".moe-convert.lock").touch()
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="symbolic link, which is never followed here"):
        convert(model, tmp_path / "out", **options)
    assert contents(tmp_path) == before


def test_fetched_shards_never_come_through_a_link_or_delete_a_strangers_file(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    hub.add("me/mini", model)
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "thesis.txt").write_text("theirs")
    (out / "experts").mkdir(parents=True)
    (out / ".moe-convert.lock").touch()
    (out / SOURCE_FOLDER).symlink_to(victim)
    with pytest.raises(OutputError, match="symbolic link"):
        convert(HubModel.open("me/mini"), out)
    assert (victim / "thesis.txt").read_text() == "theirs"
    (out / SOURCE_FOLDER).unlink()
    (out / SOURCE_FOLDER).mkdir()
    shard = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    (out / SOURCE_FOLDER / f"{shard}.partial").symlink_to(victim / "thesis.txt")
    with pytest.raises(OutputError, match="symbolic link"):
        convert(HubModel.open("me/mini"), out)
    assert (victim / "thesis.txt").read_text() == "theirs"


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo"])
def test_file_is_not_written_through_another_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_text("theirs")
    path = tmp_path / "a.partial"
    if kind == "link":
        path.symlink_to(tmp_path / "victim")
    elif kind == "hard link":
        path.hardlink_to(tmp_path / "victim")
    else:
        os.mkfifo(path)
    with pytest.raises(
        OutputError, match=r"a\.partial (is a symbolic link|has other hard links|is not a regular)"
    ):
        OutputFile(path)
    assert (tmp_path / "victim").read_text() == "theirs"


@pytest.mark.parametrize(
    "left", [[], ["experts"], ["experts", PARTIAL, "trunk.safetensors.partial"]], ids=str
)
def test_what_a_kill_or_a_power_loss_leaves_without_a_lock_is_ours(
    model: Path, tmp_path: Path, left: list[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).mkdir() if name == "experts" else (out / name).write_bytes(b"x")
    assert convert(model, out) == "converted"


@pytest.mark.parametrize(
    "name", ["experts/mine.txt", "experts/layer-001.safetensors.partial", "notes.partial"]
)
def test_folder_with_other_files_is_not_ours(model: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(OutputError, match="did not write"):
        convert(model, tmp_path / "out")


def test_names_of_lock_and_journal_are_durable_before_the_experts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, states = tmp_path / "out", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(out):
            states.append({p.name for p in out.iterdir()})
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    convert(model, out)
    assert states[0] == {".moe-convert.lock"}
    assert states[1] == {".moe-convert.lock", "experts"}
    assert JOURNAL in states[2]
    assert not any("partial" in name for name in states[2])


def test_probe_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new" / "out", tmp_path / "there"):
        probe_output(out, needs(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models", "there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_probe_refuses_what_the_conversion_would(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="did not write"):
        probe_output(tmp_path / "out", needs(model))
    probe_output(tmp_path / "out", needs(model), force=True)
    with pytest.raises(OutputError, match="is a file"):
        probe_output(tmp_path / "out" / "thesis.txt" / "out", needs(model))
    with pytest.raises(OutputError, match="the source"):
        probe_output(model / "out", needs(model), force=True)


def test_name_that_is_too_long_for_the_file_system_is_said_before_the_work(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="allows names of 255 bytes"):
        convert(model, tmp_path / ("é" * 128))
    with pytest.raises(OutputError, match="allows paths of 4095 bytes"):
        convert(model, tmp_path.joinpath(*["long" * 50] * 20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


def test_lack_of_inodes_is_said_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = namedtuple("status", "f_files f_favail")
    monkeypatch.setattr(os, "statvfs", lambda _: status(1000, 12))
    with pytest.raises(DoesNotFitError, match=r"has room for 12 \(inodes\)"):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(os, "statvfs", lambda _: status(0, 0))  # a file system that counts none
    probe_output(tmp_path / "out", needs(model))
