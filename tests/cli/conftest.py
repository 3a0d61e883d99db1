"""Fixtures of the tests of commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_inputs import Inputs


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, example_folder: Path) -> Path:
    """Folder with the first half of the layers converted."""
    from converter.convert import ConvertOptions, convert_checkpoint
    from converter.recipe.recipes import make_recipe

    folder = tmp_path_factory.mktemp("unfinished") / "out"
    convert_checkpoint(
        example_folder, folder, make_recipe("2bit", solver="hqq"), ConvertOptions(part=(1, 8))
    )
    return folder


@pytest.fixture
def inputs(
    tmp_path: Path, example_folder: Path, unfinished: Path, converted: Callable[[str], Path]
) -> Inputs:
    return Inputs(tmp_path, example_folder, unfinished, converted("2bit"))
