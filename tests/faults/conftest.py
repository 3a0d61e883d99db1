"""Share one warm interpreter between all tests of this folder."""

from collections.abc import Iterator

import pytest
from faults.campaigns.workshop import Lane, Workshop
from faults.shim import FaultyCommands


@pytest.fixture(scope="session")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    """A lane with four kinds of conversions."""
    with Workshop(
        tmp_path_factory.mktemp("faults"), cases=("plain", "zstd", "calibrated", "hub")
    ) as workshop:
        yield workshop.lane("lane")


@pytest.fixture(scope="session")
def commands(lane: Lane) -> FaultyCommands:
    """Runs commands under the shim."""
    return lane.commands
