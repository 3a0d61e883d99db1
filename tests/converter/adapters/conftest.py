"""Fixtures of the tests of adapters: small random checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
from random_models import write_checkpoint


@pytest.fixture(scope="session")
def bases(
    shared_folder: Callable[[str, Callable[[Path], object]], Path],
) -> Callable[[str], Path]:
    """Function name of a model -> its checkpoint. Tests only read it."""

    def of(name: str) -> Path:
        return shared_folder(
            f"base of {name}", lambda folder: write_checkpoint(folder, name, fused=False)
        )

    return of


@pytest.fixture
def base(bases: Callable[[str], Path]) -> Path:
    """A Mixtral checkpoint. Tests only read it."""
    return bases("mixtral")
