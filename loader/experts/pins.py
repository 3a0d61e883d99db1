"""The holders of pins on a cache's experts, from which repair computes the pin counts."""

import threading
import weakref
from collections import Counter
from dataclasses import dataclass

from loader.experts.cache_entry import CacheEntry


class PinHolder:
    """A lease or a prompt's stream, which pins experts: each of `entries` has one pin for it."""

    __slots__ = ("__weakref__", "entries")

    def __init__(self) -> None:
        self.entries: list[CacheEntry] = []


@dataclass(frozen=True, slots=True)
class _Registration:
    thread: threading.Thread
    holder: "weakref.ref[PinHolder]"
    entries: list[CacheEntry]


class PinRegistry:
    """The pin holders of a cache, at most one for each thread. The owner has a lock.

    A thread that begins a second holder was interrupted in the first one, whose pins are then
    released. Pins are also released if the thread is dead, or if nobody refers to the holder.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, _Registration] = {}
        """Registration by thread ident."""
        self.released: list[CacheEntry] = []
        """Entries of released holders, until the state is repaired."""

    def begin(self, holder: PinHolder) -> bool:
        """Register the holder, before its first pin.

        False if the thread had another holder; the caller must then repair the pins.
        """
        ident = threading.get_ident()
        if ident in self._by_thread and self._by_thread[ident].entries is holder.entries:
            return True
        was_interrupted = self.release_interrupted()
        self._by_thread[ident] = _Registration(
            threading.current_thread(), weakref.ref(holder), holder.entries
        )
        return not was_interrupted

    def has(self, holder: PinHolder) -> bool:
        """True if the holder is registered: it has begun, and was not ended or released."""
        return self._ident(holder) is not None

    def end(self, holder: PinHolder) -> None:
        """Remove the holder."""
        ident = self._ident(holder)
        if ident is not None:
            del self._by_thread[ident]

    def release_interrupted(self) -> bool:
        """Release this thread's holder. True if it had one: the caller must repair the pins."""
        ident = threading.get_ident()
        if ident not in self._by_thread:
            return False
        self.released += self._by_thread[ident].entries
        del self._by_thread[ident]
        return True

    def start_anew(self) -> None:
        """Keep only this thread's holder, in a forked child: it has no other threads."""
        ident = threading.get_ident()
        self._by_thread = {ident: self._by_thread[ident]} if ident in self._by_thread else {}

    def _ident(self, holder: PinHolder) -> int | None:
        # Usually the current thread, but any thread may close a generator.
        for ident in (threading.get_ident(), *self._by_thread):
            if ident in self._by_thread and self._by_thread[ident].entries is holder.entries:
                return ident
        return None

    def repair(self) -> Counter[CacheEntry]:
        """Release the holders that nobody will end, and return the pin counts of the others."""
        for ident, registration in list(self._by_thread.items()):
            if not registration.thread.is_alive() or registration.holder() is None:
                self.released += registration.entries
                del self._by_thread[ident]
        return Counter(
            entry for registration in self._by_thread.values() for entry in registration.entries
        )
