"""The command on the model card makes the index's recipe again."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_folders import VECTORS
from msgspec.structs import replace

from converter.cli.commands.convert_command import command
from converter.cli.steps.convert_source import recipe_of
from converter.publish.recipe_command import CALIBRATION_TEXT, convert_line
from converter.recipe.recipes import RECIPES, make_recipe
from formats.artifact import Artifact
from formats.errors import RecipeError
from formats.index import Index

CHANGES: list[dict[str, Any]] = [
    *({"name": name} for name in RECIPES),
    {"name": "2bit", "calibrate": "none"},
    {"name": "2bit", "solver": "hqq"},
    {"name": "3bit", "calibration_tokens": 2048},
    {"name": "3bit", "calibrate": "random", "calibration_tokens": 4096},
    {"name": "paper-2bit", "solver": "refit"},
    {"bits": 4, "group_size": 64, "attn_bits": 16, "head_bits": 4},
    {"bits": 16},
    {"gate_up": "tile32-q3-g64-s8", "down": "tile32-q4-g64-s8"},
    {"target_bpw": 2.7},
    {"rules": ["0-3/down=3bit,1:0-1=16bit", "2=4bit"]},
    {"down_width": "full"},
    {"down_width": 512},
]


def index_of(**changes: Any) -> Index:
    index = Artifact.open(VECTORS / "folder").index
    return replace(index, recipe=make_recipe(**changes).recorded)


def parsed(line: str) -> dict[str, Any]:
    """The options that the command line would get from this line."""
    program, subcommand, *words = shlex.split(line)
    assert (program, subcommand) == ("moe-convert", "convert")
    # click keeps a command's first help option, which the page of commands shows.
    names = ["-h", "--help"]
    return command.make_context("convert", words, help_option_names=names).params


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_command_makes_the_same_recipe(changes: dict[str, Any]) -> None:
    index = index_of(**changes)
    assert recipe_of(parsed(convert_line(index))).recorded == index.recipe


def test_calibration_text_of_the_user_is_a_placeholder() -> None:
    index = index_of(calibrate="file", calibration_tokens=2048)
    options = parsed(convert_line(index))
    assert options["calibrate"] == CALIBRATION_TEXT
    assert recipe_of(options).recorded == index.recipe


def test_changed_recipe_is_told_from_the_nearest_one() -> None:
    line = convert_line(index_of(name="3bit", rules=["0=4bit"]))
    assert line.endswith(" --recipe 3bit --layer-bits 0=tile32-q4-g64-s8")


def test_repository_is_named_with_its_commit() -> None:
    index = index_of()
    index = replace(index, source=replace(index.source, name="me/tiny", revision="a" * 40))
    options = parsed(convert_line(index))
    assert (str(options["model"]), options["revision"]) == ("me/tiny", "a" * 40)


@pytest.mark.parametrize("name", ["--force", "my model", "$(reboot)", "`x`", "a;b"])
def test_name_of_a_folder_is_one_word_of_the_shell(name: str) -> None:
    index = index_of()
    index = replace(index, source=replace(index.source, name=name, revision=None))
    options = parsed(convert_line(index))
    assert options["model"] == Path(name)
    assert not options["force"]


def test_compression_is_named(converted: Callable[[str], Path]) -> None:
    index = Artifact.open(converted("2bit")).index
    entry = replace(index.layers[0].experts[0], codec="zstd")
    layers = [replace(index.layers[0], experts=[entry])]
    assert parsed(convert_line(replace(index, layers=layers)))["codec"] == "zstd"


def test_options_of_another_release_are_an_error() -> None:
    index = index_of()
    options = {**index.recipe.options, "calibrate": "by magic"}
    with pytest.raises(RecipeError, match="by magic"):
        convert_line(replace(index, recipe=replace(index.recipe, options=options)))
