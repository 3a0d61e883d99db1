"""Fixtures of the tests of `moe-convert convert`."""

from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import SHAPES, make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "mini"
    make_checkpoint(folder, SHAPES["mini"], 2)
    return folder


@pytest.fixture
def run(run_command: Any) -> Any:
    return run_command
