"""Fixtures of exports: one source, its conversions by recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported_models import convert_wide, write_wide_source

Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def wide_source(shared_folder: Shared) -> Path:
    return shared_folder("wide source", write_wide_source)


@pytest.fixture(scope="session")
def wide(shared_folder: Shared, wide_source: Path) -> Callable[..., Path]:
    """Function (recipe, options) -> folder of the converted source. Tests only read it."""

    def folder_of(recipe: str = "2bit", **options: Any) -> Path:
        name = " ".join(["wide", recipe, *(f"{key}={options[key]}" for key in sorted(options))])
        return shared_folder(
            name.replace("/", "_"),
            lambda folder: convert_wide(wide_source, folder, recipe, **options),
        )

    return folder_of
