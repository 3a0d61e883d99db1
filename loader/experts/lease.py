"""A lease: one token's experts of a layer, pinned while they are used."""

import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from loader.experts.cache_entry import CacheEntry
from loader.experts.cache_state import CacheState
from loader.experts.pins import PinHolder
from loader.experts.slots import LayerSlots


class Lease(PinHolder):
    """Pins one token's experts while its `with` block runs.

    Work that the caller puts on its stream before the block ends may use the tensors of `parts` and
    `all`.
    """

    __slots__ = ("_experts", "_slots", "_state", "ready")

    def __init__(self, slots: LayerSlots, experts: Sequence[int], state: CacheState) -> None:
        super().__init__()
        self._slots = slots
        self._experts = experts
        self._state = state
        self.ready: dict[int, Tensor] = {}
        """Hits: number -> uint8 [n_bytes], read-only. On a GPU use `parts` or `all` instead."""

    def __enter__(self) -> "Lease":
        """Pin the different experts, by rank, and start the reads of misses.

        Raises ValueError if the cache cannot hold so many experts at once.
        """
        try:
            self._state.monitor.wait_for(self._begin)
            return self
        except BaseException:
            self.__exit__()
            raise

    def parts(self) -> Iterator[dict[int, Tensor]]:
        """Yield the hits, then the misses as they arrive: number -> uint8 [n_bytes].

        Experts whose copies are only queued come one by one, so that the first need not wait for
        the last. Raises the errors of `formats.reading.reader.Load`.
        """
        if self.ready:
            self._slots.before_use(self.ready.values())
            yield self.ready
        missing = [entry for entry in self.entries if entry.expert not in self.ready]
        while missing:
            begin_s = time.perf_counter()
            part = self._state.monitor.wait_for(lambda: arrived(missing) or None)  # noqa: B023
            self._state.count_wait(time.perf_counter() - begin_s)
            missing = [entry for entry in missing if entry not in part]
            blobs = {entry.expert: blob_of(entry) for entry in part}
            self._slots.before_use(blobs.values())
            yield blobs

    def all(self) -> dict[int, Tensor]:
        """Wait for the misses and return all experts, by rank. Raises the errors of `parts`."""
        if self.is_complete:
            self._slots.before_use(self.ready.values())
            return self.ready
        blobs = {expert: blob for part in self.parts() for expert, blob in part.items()}
        return {entry.expert: blobs[entry.expert] for entry in self.entries}

    @property
    def is_complete(self) -> bool:
        """True if all experts were hits."""
        return len(self.ready) == len(self.entries)

    def __exit__(self, *raised: object) -> None:
        state, slots = self._state, self._slots
        with state.monitor.lock, state.monitor:
            if not state.pins.has(self):
                return
            slots.after_use(self.entries)
            state.pins.end(self)
            for entry in self.entries:
                # With fewer slots than experts, the last ones stay.
                slots.keep(entry, (entry.expert,))
                slots.end(entry)
            state.monitor.notify_all()

    def _begin(self) -> "Lease | None":
        state, slots, experts = self._state, self._slots, self._experts
        state.begin(self)
        cached = slots.cached
        is_hit = all(expert in cached for expert in experts)
        if not is_hit and not _make_room(slots, experts, state.make_room):
            return None
        if is_hit:
            slots.hits += len(experts)
            for expert in experts:
                self.entries.append(cached[expert])
                cached[expert].pins += 1
        else:
            self._demand()
        if slots.staged:
            slots.drop_guesses()
        self.ready = {
            entry.expert: entry.blob
            for entry in self.entries
            if entry.blob is not None and not entry.is_queued
        }
        return self

    def _demand(self) -> None:
        slots, experts = self._slots, self._experts
        slots.hits += sum(expert in slots.cached for expert in experts)
        # Experts on their way first: the disk continues with them, and the read is not counted as
        # delayed by a guess.
        for expert in sorted(experts, key=lambda expert: expert not in slots.staged):
            entry = slots.take(expert, experts)
            if entry is None:
                raise RuntimeError(f"layer {slots.layer}: no room for expert {expert}")
            self.entries.append(entry)
            entry.pins += 1
        self.entries.sort(key=lambda entry: experts.index(entry.expert))


def _make_room(slots: LayerSlots, experts: Sequence[int], make_room: Callable[[], None]) -> bool:
    if len(experts) > slots.max_experts or len(set(experts)) != len(experts):
        raise ValueError(
            f"layer {slots.layer}: asked for experts {list(experts)} at once;"
            f" the cache holds {slots.max_experts} different ones"
        )
    if not slots.has_room_for(experts):
        # Prefetches or other leases have it. A lease never waits for more room while it holds some.
        make_room()
    return slots.has_room_for(experts)


def arrived(entries: Sequence[CacheEntry]) -> list[CacheEntry]:
    """Return the entries that can be used now or have failed.

    If all of these are only queued copies, return the first one alone.
    """
    done = [entry for entry in entries if not entry.job]
    return [entry for entry in done if not entry.is_queued] or done[:1]


def blob_of(entry: CacheEntry) -> Tensor:
    """Return the bytes of an expert whose read has ended, or raise the read's error."""
    if entry.error:
        raise entry.error
    if entry.blob is None:
        raise RuntimeError(f"expert {entry.expert} has neither bytes nor a read under way")
    return entry.blob
