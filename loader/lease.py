"""One token's experts of a layer, held while they are used."""

import time
from collections.abc import Callable, Iterator, Sequence
from threading import Condition

from torch import Tensor

from loader.slots import Held, LayerSlots


class Lease:
    """Experts that stay where they are until the lease ends. Use it as a context.

    What `parts` and `all` give may be used by what the caller's stream is given before the lease ends."""

    __slots__ = ("_held", "_lock", "_slots", "_waited", "ready")

    def __init__(
        self,
        slots: LayerSlots,
        experts: Sequence[int],
        lock: Condition,
        make_room: Callable[[], None],
        waited: Callable[[float], None],
    ) -> None:
        """Pins the different `experts`, by rank; what is missing is being read when this returns. With `lock` held.

        ValueError for more experts than can be in memory; arguments as those of `loader.streaming.stream`."""
        self._slots, self._lock, self._waited = slots, lock, waited
        held = slots.held
        found = [held[expert] for expert in experts if expert in held]
        if len(found) < len(experts):
            found = _demand(slots, experts, lock, make_room)
        else:
            slots.hits += len(found)
            for entry in found:
                entry.pins += 1
        if slots.outside:
            slots.drop_guesses()
        self._held = found
        self.ready: dict[int, Tensor] = {
            entry.expert: entry.blob for entry in found if entry.blob is not None and not entry.queued
        }
        """Those that were there at once: uint8 [n_bytes] each, read-only. On a GPU to be had from `parts` or `all`."""

    def parts(self) -> Iterator[dict[int, Tensor]]:
        """What is `ready`, if anything, then the others as they arrive; of those whose copies are queued, one by one,
        so that the first need not wait for the last. Errors as `formats.reader.Load`."""
        if self.ready:
            self._slots.before_use(self.ready.values())
            yield self.ready
        missing = [entry for entry in self._held if entry.expert not in self.ready]
        while missing:
            begin_s = time.perf_counter()
            with self._lock:
                while not (part := arrived(missing)):
                    self._lock.wait()
                self._waited(time.perf_counter() - begin_s)
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
        return {entry.expert: found[entry.expert] for entry in self._held}

    @property
    def is_complete(self) -> bool:
        """Whether all were ready."""
        return len(self.ready) == len(self._held)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._slots.after_use(self._held)
            for entry in self._held:
                # With fewer slots than experts, the last ones stay.
                self._slots.keep(entry, (entry.expert,))
                self._slots.end(entry)
            self._lock.notify_all()


def _demand(slots: LayerSlots, experts: Sequence[int], lock: Condition, make_room: Callable[[], None]) -> list[Held]:
    if len(experts) > slots.most or len(set(experts)) != len(experts):
        raise ValueError(f"asked for experts {list(experts)} at once, where {slots.most} different ones have room")
    while not slots.has_room_for(experts):
        # Guesses, or other leases, which never hold room while they wait for more.
        make_room()
        if not slots.has_room_for(experts):
            lock.wait()
    slots.hits += sum(expert in slots.held for expert in experts)
    taken: dict[int, Held] = {}
    try:
        # What is on its way already first: the disk goes on with it, and is not called busy with a guess.
        for expert in sorted(experts, key=lambda expert: expert not in slots.outside):
            if (entry := slots.take(expert, experts)) is None:
                raise RuntimeError(f"no room for expert {expert}")
            entry.pins += 1
            taken[expert] = entry
    except BaseException:
        for entry in taken.values():
            slots.end(entry)
        raise
    return [taken[expert] for expert in experts]


def arrived(entries: Sequence[Held]) -> list[Held]:
    """Those that can be used now, or failed: all that are there, else the first whose copy is queued."""
    there = [entry for entry in entries if not entry.job]
    return [entry for entry in there if not entry.queued] or there[:1]


def blob_of(entry: Held) -> Tensor:
    """The bytes of an expert that is no longer on its way, or its error."""
    if entry.error:
        raise entry.error
    if entry.blob is None:
        raise RuntimeError(f"expert {entry.expert} is neither there nor on its way")
    return entry.blob
