"""Pipes in the place of our files: no command waits for a writer."""

import os

import pytest
from faults.campaigns.workshop import CASES, Lane
from faults.shim import compiler

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C compiler and LD_PRELOAD")


@pytest.mark.parametrize("name", [".moe-convert.source", ".moe-convert.calibration"])
def test_pipe_at_the_name_of_a_folder_of_state_does_not_block(lane: Lane, name: str) -> None:
    case = CASES["plain"]
    lane.copy(lane.workshop.good(case, lane).folder)
    os.mkfifo(lane.out / name)
    assert lane.convert(case).code == 0
