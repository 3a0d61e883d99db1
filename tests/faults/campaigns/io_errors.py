"""Failing calls: each call of a conversion, with each error of disks and file systems."""

import errno
import random

from faults.campaigns.workshop import RESULT, Lane, is_refused
from faults.shim import Fault

ERRORS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENOMEM,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EFBIG,
    errno.ENOENT,
    errno.EBUSY,
    errno.ENODEV,
)
READING = ("open", "read", "stat", "lock", "seek", "direct")


class IoErrors:
    """One call fails, or it and all later ones.

    The command gives an error of ours or the same bytes; repeated, it gives the same bytes.
    """

    def states(self, lane: Lane) -> None:
        """Endless."""
        return None

    def attempt(self, state: random.Random, lane: Lane) -> str:
        """Tries one state."""
        case = state.choice(lane.workshop.cases)
        calls = lane.workshop.good(case, lane).calls
        if state.random() < 0.7:
            function, path, first = "*", RESULT, state.randint(1, len(calls))
        else:
            path = state.choice((RESULT, "/checkpoint/"))
            function, first = state.choice(READING), state.choice((1, 2, 3, 5, 8, 13, 21, 34, 55))
        fault = Fault(function, path, state.choice(ERRORS), first, state.choice((1, 1, 0)))
        lane.clear()
        ended = lane.convert(case, faults=[fault])
        if is_refused(ended):
            lane.check_resume(case)
            return "error, then same bytes"
        lane.check_result(case)
        return "same bytes" if ended.hits else "no such call"
