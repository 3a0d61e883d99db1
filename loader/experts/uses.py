"""Who uses experts of a cache: what is pinned follows from this, whatever an interrupt left undone."""

import threading
import weakref
from collections import Counter

from loader.experts.slots import Held


class Use:
    """Experts that a thread uses, of a lease or of a prompt's stream: each of `entries` has a pin
    for it.
    """

    __slots__ = ("__weakref__", "entries")

    def __init__(self) -> None:
        self.entries: list[Held] = []


class Uses:
    """The uses of a cache, one a thread: a thread that begins another one was interrupted in the
    last.

    A use is given up too when its thread is dead, or when nobody refers to it any more. Its owner
    has a lock.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[threading.Thread, weakref.ref[Use], list[Held]]] = {}
        """By the thread's number."""
        self.given_up: list[Held] = []
        """Experts of uses that were given up, until `mend` is over."""

    def begin(self, use: Use) -> bool:
        """Notes the use, before its first pin. False if the thread had another one, whose pins are
        to be mended.
        """
        number = threading.get_ident()
        if number in self._of and self._of[number][2] is use.entries:
            return True
        was_interrupted = self.give_up()
        self._of[number] = threading.current_thread(), weakref.ref(use), use.entries
        return not was_interrupted

    def holds(self, use: Use) -> bool:
        """Whether it was begun, and not given up or ended."""
        return self._number(use) is not None

    def end(self, use: Use) -> None:
        """Forgets the use."""
        if (number := self._number(use)) is not None:
            del self._of[number]

    def give_up(self) -> bool:
        """Forgets the use that this thread has; whether it had one. Its pins are then to be mended."""
        number = threading.get_ident()
        if number not in self._of:
            return False
        self.given_up += self._of[number][2]
        del self._of[number]
        return True

    def start_anew(self) -> None:
        """For a forked child: the other threads are not here."""
        number = threading.get_ident()
        self._of = {number: self._of[number]} if number in self._of else {}

    def _number(self, use: Use) -> int | None:
        # Most often the present thread's, but any thread may close a generator.
        for number in (threading.get_ident(), *self._of):
            if number in self._of and self._of[number][2] is use.entries:
                return number
        return None

    def mend(self) -> Counter[Held]:
        """Gives up the uses that nobody will end; the pins of the others."""
        for number, (thread, use, entries) in list(self._of.items()):
            if not thread.is_alive() or use() is None:
                self.given_up += entries
                del self._of[number]
        return Counter(entry for _, _, entries in self._of.values() for entry in entries)
