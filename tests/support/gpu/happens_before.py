"""Finds unordered accesses to memory by vector clocks.

Each actor has a clock. An actor is a stream, or the host with all its threads.
"""

from dataclasses import dataclass
from typing import Any

Clock = dict[str, int]
"""Actor -> its latest point that is known to be over."""


@dataclass(frozen=True)
class Access:
    actor: str
    tick: int
    name: str
    write: bool
    begin: int
    end: int
    memory: Any
    """Keeps host memory alive, so that its address is not reused."""

    def covers(self, other):
        return self.begin <= other.begin and other.end <= self.end

    def __str__(self):
        return f"{self.name} ({'write' if self.write else 'read'} on {self.actor})"


class HappensBefore:
    """Records accesses. Not thread safe.

    An access that is not ordered after an earlier conflicting one raises AssertionError with both
    names, and is added to `races`.
    """

    def __init__(self):
        self.races = []
        self._clocks = {}
        self._accesses = []

    def point(self, actor):
        """Return the clock of an actor that waits for everything `actor` did until now."""
        clock = self._clock(actor)
        point = dict(clock)
        clock[actor] += 1
        return point

    def see(self, actor, point):
        """Order all later accesses of `actor` after `point`."""
        clock = self._clock(actor)
        for other, tick in point.items():
            clock[other] = max(clock.get(other, 0), tick)

    def joined(self, *actors):
        """Return the clock of an actor that comes after all of `actors`."""
        clocks = [dict(self._clock(actor)) for actor in actors]
        return {name: max(clock.get(name, 0) for clock in clocks) for name in set().union(*clocks)}

    def access(self, actor, name, begin, end, *, write, memory=None):
        clock = self._clock(actor)
        new = Access(actor, clock[actor], name, write, begin, end, memory)
        self.check(new, clock)
        # An access ordered after the new one is ordered after all that the new one covers.
        self._accesses = [
            old
            for old in self._accesses
            if not (new.covers(old) and (write or (not old.write and old.actor == actor)))
        ]
        self._accesses.append(new)

    def check(self, new, clock):
        """Raise AssertionError if `new` conflicts with an access not ordered before `clock`."""
        for old in self._accesses:
            overlap = old.begin < new.end and new.begin < old.end
            if overlap and (old.write or new.write) and clock.get(old.actor, 0) < old.tick:
                self.races.append(
                    f"{new} is not ordered after {old}: {new.end - new.begin} bytes at "
                    f"{new.begin:#x}"
                )
                raise AssertionError(self.races[-1])

    def forget(self, begin, end):
        """Drop the accesses to memory that was freed."""
        self._accesses = [old for old in self._accesses if old.end <= begin or end <= old.begin]

    def _clock(self, actor):
        return self._clocks.setdefault(actor, {actor: 1})
