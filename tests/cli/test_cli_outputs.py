"""Commands never overwrite their inputs and never write through links: they refuse before any work
and change nothing.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import HubServer
from made_traces import random_experts, trace_of

from loader.traces.trace import write_trace

Run = Callable[..., tuple[int, str, str]]


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def refused(run: Run, folder: Path, *arguments: object) -> str:
    """Return the error of a command that must fail; check that `folder` does not change."""
    before = contents(folder)
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert contents(folder) == before
    return err


@pytest.mark.parametrize(
    "kind", ["the text", "a hard link to it", "the index", "an expert file by a link"]
)
def test_trace_does_not_replace_its_inputs(
    run_command: Run, converted_copy: Path, tmp_path: Path, kind: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    (tmp_path / "hard").hardlink_to(text)
    (tmp_path / "link").symlink_to(converted_copy / "experts" / "layer-000.safetensors")
    out = {
        "the text": text,
        "a hard link to it": tmp_path / "hard",
        "the index": converted_copy / "moe_index.json",
        "an expert file by a link": tmp_path / "link",
    }[kind]
    assert "is also read" in refused(
        run_command, tmp_path, "trace", converted_copy, "--text", text, "-o", out
    )


def test_trace_replaces_a_trace_in_the_models_folder(
    run_command: Run, converted_copy: Path, example_folder: Path
) -> None:
    out, text = converted_copy / "trace.zst", example_folder.parent / "text" / "english.txt"
    write_trace(out, trace_of(random_experts(1, 30, layers=3)))
    assert (
        run_command("trace", converted_copy, "--text", text, "--max-tokens", 256, "-o", out)[0] == 0
    )


@pytest.mark.parametrize("which", ["trace.svg", "other.svg"])
def test_plot_does_not_replace_a_trace(run_command: Run, tmp_path: Path, which: str) -> None:
    for name in ("trace.svg", "other.svg"):
        write_trace(tmp_path / name, trace_of(random_experts(1, 30, layers=3)))
    arguments = [
        "replay",
        tmp_path / "trace.svg",
        "--choose-from",
        tmp_path / "other.svg",
        "--plot",
        tmp_path / which,
    ]
    assert "is also read" in refused(run_command, tmp_path, *arguments)


def test_saved_evaluation_does_not_replace_an_input(
    run_command: Run, converted_copy: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    evaluate = ["eval", converted_copy, "--save", "--against"]
    assert "is also read" in refused(
        run_command, tmp_path, *evaluate, converted_copy, "--text", text
    )
    quality = converted_copy / "quality.json"
    assert "is also read" in refused(
        run_command, tmp_path, *evaluate, tmp_path / "original", "--text", quality
    )


@pytest.mark.parametrize("where", [".", "..", "original"])
def test_repair_does_not_write_to_its_origin(
    run_command: Run, converted_copy: Path, example_folder: Path, tmp_path: Path, where: str
) -> None:
    shutil.copytree(example_folder, converted_copy / "original")
    err = refused(run_command, tmp_path, "repair", converted_copy, "--from", converted_copy / where)
    assert "which is only read" in err


def test_repair_does_not_write_through_a_link(
    run_command: Run, converted_copy: Path, tmp_path: Path
) -> None:
    (converted_copy / "experts").rename(tmp_path / "elsewhere")
    (converted_copy / "experts").symlink_to(tmp_path / "elsewhere")
    assert "experts is a symbolic link" in refused(run_command, tmp_path, "repair", converted_copy)


def test_download_does_not_write_through_a_link(
    run_command: Run, hub: HubServer, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    hub.add("me/tiny-2bit", converted("2bit"))
    victim, here = tmp_path / "victim", tmp_path / "here"
    victim.mkdir()
    here.mkdir()
    (here / "experts").symlink_to(victim)
    err = refused(run_command, victim, "download", "me/tiny-2bit", "--local-dir", here)
    assert "experts is a symbolic link" in err


def test_download_does_not_write_into_the_cache(
    run_command: Run, hub: HubServer, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    hub.add("me/tiny-2bit", converted("2bit"))
    assert run_command("download", "me/tiny-2bit", "-q")[0] == 0
    (snapshot,) = (tmp_path / "hf-home").rglob("snapshots/*")
    err = refused(
        run_command, tmp_path / "hf-home", "download", "me/tiny-2bit", "--local-dir", snapshot
    )
    assert "lies in the Hub's cache" in err


def test_repair_replaces_what_the_disk_cannot_read(
    run_command: Run, converted_copy: Path, example_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real, layer = (
        contents(converted_copy),
        os.pread,
        converted_copy / "experts" / "layer-001.safetensors",
    )

    def pread(descriptor: int, n_bytes: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(layer) and 100_000 < offset < 200_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, n_bytes, offset)

    monkeypatch.setattr(os, "pread", pread)
    code, out, _ = run_command("repair", converted_copy, "--from", example_folder)
    monkeypatch.undo()
    assert code == 0
    assert "replaced: layer 1 expert" in out
    assert contents(converted_copy) == before
