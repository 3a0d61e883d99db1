"""One token's experts of a layer, held while they are used."""

import time
from collections.abc import Callable, Iterator, Sequence
from threading import Condition

from torch import Tensor

from loader.slots import Held, LayerSlots


class Lease:
    """Experts that stay where they are until the lease ends. Use it as a context."""

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
            taken = {entry.expert: entry for entry in _demand(slots, experts, lock, make_room)}
            found = [taken[expert] for expert in experts]
        else:
            slots.hits += len(found)
        for entry in found:
            entry.pins += 1
        if slots.outside:
            slots.drop_guesses()
        self._held = found
        self.ready: dict[int, Tensor] = {entry.expert: entry.blob for entry in found if entry.blob is not None}
        """Those that were there at once: uint8 [n_bytes] each, read-only."""

    def parts(self) -> Iterator[dict[int, Tensor]]:
        """What is `ready`, if anything, then the others as they arrive. Errors as `formats.reader.Load`."""
        if self.ready:
            yield self.ready
        missing = [entry for entry in self._held if entry.expert not in self.ready]
        while missing:
            begin_s = time.perf_counter()
            with self._lock:
                while not (part := [entry for entry in missing if not entry.job]):
                    self._lock.wait()
                self._waited(time.perf_counter() - begin_s)
            missing = [entry for entry in missing if entry not in part]
            yield {entry.expert: blob_of(entry) for entry in part}

    def all(self) -> dict[int, Tensor]:
        """Waits for what is missing, and gives all, by rank. Errors as `parts`."""
        if self.is_complete:
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
            for entry in self._held:
                # With fewer slots than experts, the last ones stay.
                self._slots.keep(entry, (entry.expert,))
                self._slots.end(entry)
            self._lock.notify_all()


def _demand(
    slots: LayerSlots, experts: Sequence[int], lock: Condition, make_room: Callable[[], None]
) -> Iterator[Held]:
    if len(experts) > slots.most or len(set(experts)) != len(experts):
        raise ValueError(f"asked for experts {list(experts)} at once, where {slots.most} different ones have room")
    while not slots.has_room_for(experts):
        # Guesses, or other leases, which never hold room while they wait for more.
        make_room()
        if not slots.has_room_for(experts):
            lock.wait()
    slots.hits += sum(expert in slots.held for expert in experts)
    # What is on its way already first: the disk goes on with it, and is not called busy with a guess.
    for expert in sorted(experts, key=lambda expert: expert not in slots.outside):
        if (entry := slots.take(expert, experts)) is None:
            raise RuntimeError(f"no room for expert {expert}")
        yield entry


def blob_of(entry: Held) -> Tensor:
    """The bytes of an expert that is no longer on its way, or its error."""
    if entry.error:
        raise entry.error
    if entry.blob is None:
        raise RuntimeError(f"expert {entry.expert} is neither there nor on its way")
    return entry.blob
