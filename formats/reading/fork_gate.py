"""Separation of forks and direct reads: a fork waits for running reads, and blocks new ones."""

import functools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S = 5.0
"""Longest wait of a fork for running reads."""

_log = logging.getLogger(__name__)


class ForkGate:
    """A gate between direct reads and forks.

    A direct read writes to pages that a fork shares. Until Linux 6.5 the parent may then lose its
    bytes (open(2), NOTES: "O_DIRECT I/Os should never be run concurrently with the fork(2) system
    call").
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reads = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold off forks during the block."""
        with self._changed:
            self._reads += 1
        try:
            yield
        finally:
            with self._changed:
                self._reads -= 1
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Wait for running reads, at most WAIT_S, and block new ones."""
        self._changed.acquire()
        if not self._changed.wait_for(lambda: not self._reads, timeout=WAIT_S):
            _log.warning(
                "process %d forks during a file read that takes longer than %.0f s:"
                " the bytes read may be wrong",
                os.getpid(),
                WAIT_S,
            )

    def after_in_parent(self) -> None:
        """Unblock reads."""
        self._changed.release()

    def after_in_child(self) -> None:
        """Reset the gate: the child runs no reads."""
        self.__init__()  # type: ignore[misc]


@functools.lru_cache(maxsize=1)
def shared_gate() -> ForkGate:
    """Return the process's gate, registered for forks on first use."""
    gate = ForkGate()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=gate.before_fork,
            after_in_parent=gate.after_in_parent,
            after_in_child=gate.after_in_child,
        )
    return gate
