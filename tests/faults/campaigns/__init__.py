"""Campaigns of injected faults against conversions and their files.

A campaign is a kind of fault. A state is one instance of it: a call and a moment, a damaged byte,
what a disk holds after a power loss. An attempt puts a conversion into a state, continues it,
and compares the result with the undisturbed conversion of the same case: it survives, or the
attempt fails. A campaign, a seed and a number name a state.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from faults.campaigns.flips import JOURNAL, KINDS, CompleteFlips, TokenFlips, UnfinishedFlips
from faults.campaigns.hostile import HostileFolders
from faults.campaigns.io_errors import IoErrors
from faults.campaigns.kills import Kills, RandomKills, RepeatedKills
from faults.campaigns.power_loss import PowerLoss
from faults.campaigns.workshop import Failed, Lane

STATE, SHARDS = ".moe-convert.calibration", ".moe-convert.source"


def is_layer_file(path: Path) -> bool:
    """True if a file of experts is complete."""
    return path.parent.name == "experts" and path.suffix == ".safetensors"


class Campaign(Protocol):
    """A kind of fault."""

    def states(self, lane: Lane) -> list[Any] | None:
        """All states; None if they are drawn by a random generator, endlessly."""

    def attempt(self, state: Any, lane: Lane) -> str:
        """Try one state, one of `states` or the generator. Return the outcome in a word or two.

        Raises Failed.
        """


CAMPAIGNS: dict[str, tuple[Campaign, int]] = {
    "first-kills": (Kills(first=12), 2),
    "kills": (Kills(), 4),
    "repeated-kills": (RepeatedKills(), 2),
    "random-kills": (RandomKills(), 2),
    "power-loss": (PowerLoss(), 3),
    "journal-flips": (
        UnfinishedFlips(("plain", "calibrated"), lambda p: p.name == JOURNAL, (*KINDS, "line")),
        2,
    ),
    "partial-flips": (
        UnfinishedFlips(("plain", "zstd", "hub"), lambda p: p.suffix == ".partial"),
        2,
    ),
    "layer-flips": (UnfinishedFlips(("plain", "zstd"), is_layer_file, refusable=False), 1),
    "state-flips": (UnfinishedFlips(("calibrated", "target"), lambda p: p.parent.name == STATE), 1),
    "shard-flips": (UnfinishedFlips(("hub",), lambda p: p.parent.name == SHARDS), 1),
    "complete-flips": (CompleteFlips(), 1),
    "token-flips": (TokenFlips(), 2),
    "io-errors": (IoErrors(), 3),
    "hostile-folders": (HostileFolders(), 2),
}
"""By name, with its share of the time."""


@dataclass(frozen=True)
class Attempt:
    """The result of trying one state. failure: empty if the conversion survived."""

    number: int
    outcome: str = ""
    failure: str = ""


def attempt(name: str, seed: int, number: int, lane: Lane) -> Attempt | None:
    """Try the state of this number (from 0). None if the campaign has fewer states."""
    campaign = CAMPAIGNS[name][0]
    states = campaign.states(lane)
    if states is None:
        state: Any = random.Random(f"{name} {seed} {number}")
    elif number >= len(states):
        return None
    else:
        random.Random(seed).shuffle(states)
        state = states[number]
    try:
        return Attempt(number, outcome=campaign.attempt(state, lane))
    except Failed as e:
        return Attempt(number, failure=str(e))
