"""One token's experts of a layer, held while they are used."""

import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from loader.experts.cache_state import CacheState
from loader.experts.slots import Held, LayerSlots
from loader.experts.uses import Use


class Lease(Use):
    """Experts that stay where they are while its context lasts.

    What `parts` and `all` give may be used by what the caller's stream is given before the lease
    ends.
    """

    __slots__ = ("_experts", "_slots", "_state", "ready")

    def __init__(self, slots: LayerSlots, experts: Sequence[int], state: CacheState) -> None:
        super().__init__()
        self._slots, self._experts, self._state = slots, experts, state
        self.ready: dict[int, Tensor] = {}
        """Those that were there at once: uint8 [n_bytes] each, read-only. On a GPU to be had from
        `parts` or `all`.
        """

    def __enter__(self) -> "Lease":
        """Pins the different experts, by rank; what is missing is being read when this returns.
        ValueError for more experts than can be in memory.
        """
        try:
            self._state.changes.until(self._begin)
            return self
        except BaseException:
            self.__exit__()
            raise

    def parts(self) -> Iterator[dict[int, Tensor]]:
        """What is `ready`, if anything, then the others as they arrive; of those whose copies are
        queued, one by one, so that the first need not wait for the last. Errors as
        `formats.reading.reader.Load`.
        """
        if self.ready:
            self._slots.before_use(self.ready.values())
            yield self.ready
        missing = [entry for entry in self.entries if entry.expert not in self.ready]
        while missing:
            begin_s = time.perf_counter()
            part = self._state.changes.until(lambda: arrived(missing) or None)  # noqa: B023
            self._state.waited(time.perf_counter() - begin_s)
            missing = [entry for entry in missing if entry not in part]
            blobs = {entry.expert: blob_of(entry) for entry in part}
            self._slots.before_use(blobs.values())
            yield blobs

    def all(self) -> dict[int, Tensor]:
        """Waits for what is missing, and gives all, by rank. Errors as `parts`."""
        if self.is_complete:
            self._slots.before_use(self.ready.values())
            return self.ready
        found = {expert: blob for part in self.parts() for expert, blob in part.items()}
        return {entry.expert: found[entry.expert] for entry in self.entries}

    @property
    def is_complete(self) -> bool:
        """Whether all were ready."""
        return len(self.ready) == len(self.entries)

    def __exit__(self, *raised: object) -> None:
        state, slots = self._state, self._slots
        with state.changes.lock, state.changes:
            if not state.uses.holds(self):
                return
            slots.after_use(self.entries)
            state.uses.end(self)
            for entry in self.entries:
                # With fewer slots than experts, the last ones stay.
                slots.keep(entry, (entry.expert,))
                slots.end(entry)
            state.changes.ring()

    def _begin(self) -> "Lease | None":
        state, slots, experts = self._state, self._slots, self._experts
        state.begin(self)
        held = slots.held
        is_there = all(expert in held for expert in experts)
        if not is_there and not _make_room(slots, experts, state.make_room):
            return None
        if is_there:
            slots.hits += len(experts)
            for expert in experts:
                self.entries.append(held[expert])
                held[expert].pins += 1
        else:
            self._demand()
        if slots.outside:
            slots.drop_guesses()
        self.ready = {
            entry.expert: entry.blob
            for entry in self.entries
            if entry.blob is not None and not entry.queued
        }
        return self

    def _demand(self) -> None:
        slots, experts = self._slots, self._experts
        slots.hits += sum(expert in slots.held for expert in experts)
        # What is on its way already first: the disk goes on with it, and is not called busy with a
        # guess.
        for expert in sorted(experts, key=lambda expert: expert not in slots.outside):
            if (entry := slots.take(expert, experts)) is None:
                raise RuntimeError(f"no room for expert {expert}")
            self.entries.append(entry)
            entry.pins += 1
        self.entries.sort(key=lambda entry: experts.index(entry.expert))


def _make_room(slots: LayerSlots, experts: Sequence[int], make_room: Callable[[], None]) -> bool:
    if len(experts) > slots.most or len(set(experts)) != len(experts):
        raise ValueError(
            f"asked for experts {list(experts)} at once, where {slots.most} different ones have room"
        )
    if not slots.has_room_for(experts):
        # Guesses, or other leases, which never hold room while they wait for more.
        make_room()
    return slots.has_room_for(experts)


def arrived(entries: Sequence[Held]) -> list[Held]:
    """Those that can be used now, or failed: all that are there, else the first whose copy is
    queued.
    """
    there = [entry for entry in entries if not entry.job]
    return [entry for entry in there if not entry.queued] or there[:1]


def blob_of(entry: Held) -> Tensor:
    """The bytes of an expert that is no longer on its way, or its error."""
    if entry.error:
        raise entry.error
    if entry.blob is None:
        raise RuntimeError(f"expert {entry.expert} is neither there nor on its way")
    return entry.blob
