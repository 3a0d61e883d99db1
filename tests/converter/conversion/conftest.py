"""Fixtures of the tests of conversions."""

from pathlib import Path

import pytest
from interrupted_runs import convert, hashes


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the undisturbed conversion of `source`."""
    out = tmp_path_factory.mktemp("reference") / "out"
    convert(source, out)
    return hashes(out)
