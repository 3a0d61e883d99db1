"""A monitor: a lock and a condition over state that is repaired after an interrupted change."""

import threading
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

CHECK_EVERY_S = 1.0
"""Seconds after which a waiting thread has the state repaired: the thread that should wake it may
be dead.
"""


def nothing() -> None:
    """Repair nothing."""


class Monitor:
    """Guards the state of a cache; each change runs inside `with monitor.lock, monitor:`.

    A KeyboardInterrupt can come between any two statements, also inside a `finally`. So no code
    undoes its own half-done change. Instead, an exception that leaves the block marks the state as
    unfinished, and the next block of any thread calls `repair` first; so does a long wait. `repair`
    makes the state consistent whatever was done of the change, and releases what dead threads held.
    It may itself be interrupted. Blocks are not nested.

    threading.Condition is no substitute: an interrupt inside its Python code keeps the lock, or
    loses it. The lock's own __enter__ and __exit__ are C code, which no interrupt divides.
    """

    def __init__(self) -> None:
        self.repair: Callable[[], None] = nothing
        self.start_anew()

    def start_anew(self) -> None:
        """Make new locks in a forked child: threads that it lacks may own the old ones."""
        self.lock = threading.RLock()
        self._waiters: list[SimpleQueue[None]] = []
        self._thread: int | None = None
        self._unfinished = True

    def __enter__(self) -> "Monitor":
        if self._unfinished:
            self.repair()
        self._unfinished = True
        self._thread = threading.get_ident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread = None
        if kind is None:
            self._unfinished = False

    @property
    def is_here(self) -> bool:
        """True if this thread may be in a block: the garbage collector can run code within it."""
        return self._thread == threading.get_ident()

    def notify_all(self) -> None:
        """Wake all waiting threads. Called with the lock held."""
        for waiter in self._waiters:
            waiter.put(None)
        self._waiters.clear()

    def waiter(self) -> "SimpleQueue[None]":
        """Return a queue for one waiting thread; the next `notify_all` puts an item into it.

        Called with the lock held.
        """
        waiter: SimpleQueue[None] = SimpleQueue()
        self._waiters.append(waiter)
        return waiter

    def wait_for(self, ready: Callable[[], T | None], timeout_s: float = inf) -> T:
        """Return the first result of `ready` that is not None.

        `ready` is called as a change, and again after each `notify_all`. Raises TimeoutError after
        `timeout_s` seconds.
        """
        while True:
            with self.lock, self:
                result = ready()
                if result is not None:
                    return result
                waiter = self.waiter()
            if timeout_s <= 0:
                raise TimeoutError(f"{ready} gave no result in time")
            try:
                waiter.get(timeout=CHECK_EVERY_S)
            except Empty:
                timeout_s -= CHECK_EVERY_S
                with self.lock:
                    # The thread that would notify may be dead; `repair` checks.
                    self._unfinished = True
