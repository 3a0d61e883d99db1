"""Hints of refused sources: names that are right, and commands that run."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from source_folders import SINGLE, make_single, only

from converter.checkpoint.source import Checkpoint
from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError
from formats.index import read_index

IDS = torch.randint(3, 4000, (1, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint to be changed."""
    return make_single(tmp_path / "source")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("https://huggingface.co/mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        (
            "https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/tree/main",
            "mistralai/Mixtral-8x7B-v0.1",
        ),
        ("huggingface.co/mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("https://hf.co/mistralai/Mixtral-8x7B-v0.1.git", "mistralai/Mixtral-8x7B-v0.1"),
        ("hf://mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
    ],
)
def test_page_address_gets_the_name_of_its_repository(
    run_command: Callable[..., tuple[int, str, str]], name: str, hint: str
) -> None:
    code, _, stderr = run_command("convert", name, "--dry-run")
    assert code == 1
    assert stderr.rstrip().endswith(f"name the repository, not its page: {hint}")


def test_mistyped_path_gets_the_folder_that_is_there(source: Path) -> None:
    with pytest.raises(MoeConvertError, match="is not a folder") as caught:
        Checkpoint(source.with_name("sorce"))
    assert caught.value.hint == f"is {source} meant?"


def test_mistyped_relative_path_gets_the_folder_that_is_there(
    source: Path, run_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent.parent)
    name = f"{source.parent.name}/sorce"
    code, _, stderr = run_command("convert", name, "--dry-run")
    assert code == 1
    assert stderr.rstrip().endswith(f"is the folder {source.parent.name}/source meant?")


def test_path_of_a_gguf_file_is_refused_as_such(source: Path) -> None:
    (source / "model.gguf").write_text("")
    with pytest.raises(MoeConvertError, match="holds a GGUF file") as caught:
        Checkpoint(source / "model.gguf")
    assert "safetensors checkpoint" in caught.value.hint


def test_path_of_a_file_gets_its_folder(source: Path) -> None:
    with pytest.raises(MoeConvertError, match="is a file") as caught:
        Checkpoint(source / SINGLE)
    assert caught.value.hint == f"name its folder: {source}"


def test_hint_of_an_adapter_converts_its_base_with_it(
    source: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    make_adapter(source, tmp_path / "adapter")
    with pytest.raises(MoeConvertError) as caught:
        Checkpoint(tmp_path / "adapter")
    program, *arguments = shlex.split(
        caught.value.hint.partition(": ")[2].replace("BASE", str(source))
    )
    assert program == "moe-convert"
    options = ["--recipe", "16bit", "-o", tmp_path / "out"]
    assert run_command(*arguments, *options)[0] == 0
    assert [a.name for a in read_index(tmp_path / "out").source.adapters] == ["adapter"]


def test_hint_of_a_converted_folder_shows_its_source(
    source: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, make_recipe("16bit"))
    with pytest.raises(MoeConvertError) as caught:
        Checkpoint(out)
    command = re.search(r"moe-convert (inspect .*) shows", caught.value.hint)
    assert command
    code, stdout, _ = run_command(*shlex.split(command[1]))
    assert code == 0
    assert source.name in stdout


def test_hint_of_an_unfinished_folder_ends_its_conversion(
    source: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, out, make_recipe("16bit"), ConvertOptions(part=(1, 2)))
    with pytest.raises(MoeConvertError) as caught:
        Checkpoint(out)
    command = caught.value.hint.partition(": moe-convert ")[2].replace("CHECKPOINT", str(source))
    code, _, _ = run_command(*shlex.split(command), "--recipe", "16bit", "-q")
    assert code == 0
    assert (out / "moe_index.json").exists()


def test_hint_of_mistrals_layout_names_options_that_exist(source: Path) -> None:
    only("consolidated.safetensors")(source)
    with pytest.raises(MoeConvertError) as caught:
        Checkpoint(source)
    command = Path(sys.executable).with_name("hf")
    shown = subprocess.run(
        [command, "download", "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = re.findall(r"--[a-z-]+", caught.value.hint)
    assert options == ["--exclude", "--local-dir"]
    assert all(option in shown for option in options)
