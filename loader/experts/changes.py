"""A lock over state that an exception may leave half changed: it is mended before the next change."""

import threading
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

LOOK_EVERY_S = 1.0
"""How long a wait goes on before it looks whether the thread that would end it still lives."""


def nothing() -> None:
    """Where there is nothing to mend."""


class Changes:
    """Each change runs inside `with changes.lock, changes:`, in this order.

    A KeyboardInterrupt comes at any place, also between two statements of a `finally`. So no code
    puts its own half change right: an exception that leaves the block marks the state as
    unfinished, and `mend` is called when the next block begins, in whichever thread, and when a
    wait lasts long. It makes the state consistent whatever was done of a change, gives up what dead
    threads held, and may itself be interrupted. Blocks are not nested.

    threading.Condition does not do here: an interrupt within its Python code keeps the lock, or
    loses it. The lock's own __enter__ and __exit__ are C, which no interrupt divides.
    """

    def __init__(self) -> None:
        self.mend: Callable[[], None] = nothing
        self.start_anew()

    def start_anew(self) -> None:
        """For a forked child: the lock's owner, and who waits, may be threads that are not here."""
        self.lock = threading.RLock()
        self._bells: list[SimpleQueue[None]] = []
        self._thread: int | None = None
        self._unfinished = True

    def __enter__(self) -> "Changes":
        if self._unfinished:
            self.mend()
        self._unfinished, self._thread = True, threading.get_ident()
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
        """Whether this thread may be inside a block: the garbage collector runs code within
        another's.
        """
        return self._thread == threading.get_ident()

    def ring(self) -> None:
        """Wakes all who wait. With the lock held."""
        for bell in self._bells:
            bell.put(None)
        self._bells.clear()

    def bell(self) -> "SimpleQueue[None]":
        """For one waiting thread: the next `ring` puts something into it. With the lock held."""
        bell: SimpleQueue[None] = SimpleQueue()
        self._bells.append(bell)
        return bell

    def until(self, ready: Callable[[], T | None], timeout_s: float = inf) -> T:
        """What `ready` gives, asked as a change, again after each `ring` until it is not None.
        TimeoutError.
        """
        while True:
            with self.lock, self:
                if (found := ready()) is not None:
                    return found
                bell = self.bell()
            if timeout_s <= 0:
                raise TimeoutError(f"{ready} gave nothing")
            try:
                bell.get(timeout=LOOK_EVERY_S)
            except Empty:
                timeout_s -= LOOK_EVERY_S
                with self.lock:
                    # Whom it waits for may be dead: `mend` looks.
                    self._unfinished = True
