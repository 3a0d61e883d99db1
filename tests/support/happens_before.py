"""Which accesses to memory are ordered: vector clocks, one for each actor (a stream; the host with
all threads).
"""

from dataclasses import dataclass
from typing import Any

Clock = dict[str, int]
"""Actor -> the latest of its points that is known to be over."""


@dataclass(frozen=True)
class Access:
    actor: str
    tick: int
    name: str
    write: bool
    begin: int
    end: int
    memory: Any
    """Keeps host memory alive, so that its address is not another one's."""

    def covers(self, other):
        return self.begin <= other.begin and other.end <= self.end

    def __str__(self):
        return f"{self.name} ({'write' if self.write else 'read'} on {self.actor})"


class HappensBefore:
    """Notes accesses; one that is not ordered after an earlier conflicting one raises
    AssertionError, which names both, and stays in `races`. Not thread safe.
    """

    def __init__(self):
        self.races = []
        self._clocks = {}
        self._accesses = []

    def point(self, actor):
        """The clock of whoever waits for all that `actor` has done until now."""
        clock = self._clock(actor)
        point = dict(clock)
        clock[actor] += 1
        return point

    def see(self, actor, point):
        """What `actor` does from now on comes after `point`."""
        clock = self._clock(actor)
        for other, tick in point.items():
            clock[other] = max(clock.get(other, 0), tick)

    def joined(self, *actors):
        """The clock of somebody who comes after all of `actors`."""
        clocks = [dict(self._clock(actor)) for actor in actors]
        return {name: max(clock.get(name, 0) for clock in clocks) for name in set().union(*clocks)}

    def access(self, actor, name, begin, end, *, write, memory=None):
        clock = self._clock(actor)
        new = Access(actor, clock[actor], name, write, begin, end, memory)
        self.check(new, clock)
        # Whoever is ordered after the new one is ordered after those that it covers.
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
        """The memory is no longer what it was."""
        self._accesses = [old for old in self._accesses if old.end <= begin or end <= old.begin]

    def _clock(self, actor):
        return self._clocks.setdefault(actor, {actor: 1})
