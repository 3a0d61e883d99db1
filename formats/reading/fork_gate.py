"""Reads that a fork must not come upon: it waits for those under way, and holds up others."""

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S = 5.0

_log = logging.getLogger(__name__)


class ForkGate:
    """Direct reads write to pages that a fork would share: until Linux 6.5 their bytes may then be
    lost in the parent (open(2), NOTES, "O_DIRECT I/Os should never be run concurrently with the
    fork(2) system call").
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reads = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Inside, a fork waits."""
        with self._changed:
            self._reads += 1
        try:
            yield
        finally:
            with self._changed:
                self._reads -= 1
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Waits for the reads under way, and lets no other begin."""
        self._changed.acquire()
        if not self._changed.wait_for(lambda: not self._reads, timeout=WAIT_S):
            _log.warning(
                "process %d forks while a file is read, which takes longer than %.0f s",
                os.getpid(),
                WAIT_S,
            )

    def after_in_parent(self) -> None:
        """Lets reads go on."""
        self._changed.release()

    def after_in_child(self) -> None:
        """Begins anew: the child has none of the reads."""
        self.__init__()  # type: ignore[misc]


@functools.lru_cache(maxsize=1)
def shared_gate() -> ForkGate:
    """The process's gate."""
    gate = ForkGate()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=gate.before_fork,
            after_in_parent=gate.after_in_parent,
            after_in_child=gate.after_in_child,
        )
    return gate
