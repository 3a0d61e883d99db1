"""Kills: at each call that changes a file, twice with damage between, and at random moments."""

import random
from pathlib import Path
from typing import Literal

from faults.campaigns.damage import damage
from faults.campaigns.workshop import INDEX, RESULT, Case, Failed, Lane
from faults.shim import Kill

Moment = Literal["before", "after", "torn"]
MOMENTS: tuple[Moment, ...] = ("before", "after", "torn")
KillState = tuple[Case, int, Moment]


class Kills:
    """A kill before, in, or after one call: one of the `first` calls, or any.

    The same command then gives the same bytes.
    """

    def __init__(self, first: int | None = None) -> None:
        self._first = first

    def states(self, lane: Lane) -> list[KillState]:
        """(case, call, moment), all of them."""
        counts = {case: len(lane.workshop.good(case, lane).calls) for case in lane.workshop.cases}
        points = (
            (case, call) for case, n in counts.items() for call in range(1, (self._first or n) + 1)
        )
        return [(case, call, when) for case, call in points for when in MOMENTS]

    def attempt(self, state: KillState, lane: Lane) -> str:
        """Tries one state."""
        case, call, when = state
        lane.clear()
        ended = lane.convert(case, faults=[Kill(when, RESULT, call)])
        check_index(lane)
        lane.check_resume(case)
        return (
            f"{case.name}: same bytes"
            if ended.code == -9
            else f"{case.name}: done before the kill, same bytes"
        )


class RepeatedKills:
    """Two to four kills, each at a random call, with damage between them.

    A file of the unfinished conversion may be lost, cut off or damaged. A later run must not trust
    the records of lost bytes.
    """

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = state.choice(lane.workshop.cases)
        calls = len(lane.workshop.good(case, lane).calls)
        lane.clear()
        for _ in range(state.randint(2, 4)):
            # Half of the kills hit the first 16 calls, the beginning of a resume.
            call = state.randint(1, state.choice((16, calls)))
            ended = lane.convert(case, faults=[Kill(state.choice(MOMENTS), RESULT, call)])
            if ended.code == 0:
                break
            if ended.code != -9:
                raise Failed(f"resume exits with {ended.code}: {ended.output}")
            check_index(lane)
            if state.random() < 0.7 and (files := unfinished_files(lane.out)):
                damage(state.choice(files), state)
        lane.check_resume(case)
        return f"{case.name}: same bytes"


class RandomKills:
    """One to six kills at random moments, with one to three workers each."""

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Try one state; its moments depend on the machine, unlike all other states."""
        case = state.choice(lane.workshop.cases)
        lane.clear()
        for _ in range(state.randint(1, 6)):
            ended = lane.convert_and_kill(case, state.uniform(0.02, 1.2), state.randint(1, 3))
            if ended.code == 0:
                break
            if ended.code != -9:
                raise Failed(f"resume exits with {ended.code}: {ended.output}")
            check_index(lane)
        lane.check_resume(case)
        return f"{case.name}: same bytes"


def check_index(lane: Lane) -> None:
    """Raise Failed if there is an index, but not everything that it lists."""
    if (lane.out / INDEX).exists():
        report = lane.run("verify", lane.out, "--read-data", "-q")
        if report.code:
            raise Failed(f"an index with damage: {report.output}")


def unfinished_files(out: Path) -> list[Path]:
    """Return the files that a resume reads, except the journal: its damage may be refused."""
    return sorted(
        p for p in out.rglob("*") if p.is_file() and (p.suffix == ".partial" or p.name == "state")
    )
