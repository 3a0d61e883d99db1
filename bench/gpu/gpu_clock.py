"""Clocks for work on a GPU that exclude the host's time to queue it."""

import statistics
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

Call = Callable[[int], object]
"""Queues the i-th piece of work on the compute stream."""

_HOLD_CYCLES = 4_000_000
"""About 2 to 4 ms, in which the host gives the GPU more work than it does in that time."""
_TRIES = 4


class Time(NamedTuple):
    """Time of some work.

    queued: True if all the work was queued before it began; otherwise `seconds` may contain pauses
    in which the GPU waited for the host.
    """

    seconds: float
    queued: bool


class Clock(Protocol):
    """Measures work on a device's compute stream."""

    def time(self, call: Call, calls: int) -> Time:
        """Return the time of call(0) ... call(calls - 1)."""


class EventClock:
    """A clock with CUDA events.

    It blocks the GPU until all work is queued, and blocks it longer if the host needs more time.
    """

    def __init__(self, index: int) -> None:
        """index: number of the GPU, which must be torch's current device."""
        self._index = index

    def time(self, call: Call, calls: int) -> Time:
        found = []
        for hold in (_HOLD_CYCLES << 2 * i for i in range(_TRIES)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self._index)
            torch.cuda._sleep(hold)
            begin.record()
            for i in range(calls):
                call(i)
            queued = not begin.query()
            end.record()
            end.synchronize()
            found.append(Time(begin.elapsed_time(end) / 1e3, queued))
            if queued:
                return found[-1]
        return min(found)


def median_time(clock: Clock, call: Call, calls: int, repeats: int) -> Time:
    """Return the median time of one call over `repeats`, after a warm-up.

    `queued` is True if all repeats were queued in time.
    """
    clock.time(call, calls)
    times = [clock.time(call, calls) for _ in range(repeats)]
    return Time(statistics.median(t.seconds for t in times) / calls, all(t.queued for t in times))
