"""A few states of each campaign of faults; `make faults` tries more."""

import pytest
from faults.campaigns import CAMPAIGNS, attempt
from faults.campaigns.workshop import Lane
from faults.shim import compiler

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C compiler and LD_PRELOAD")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_conversion_survives_fault(lane: Lane, campaign: str, number: int) -> None:
    result = attempt(campaign, 0, number, lane)
    assert result and not result.failure
