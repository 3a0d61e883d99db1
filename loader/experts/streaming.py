"""Many tokens' experts of a layer, each once, the next ones being read while the caller computes."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from torch import Tensor

from loader.experts.cache_state import CacheState
from loader.experts.lease import arrived, blob_of
from loader.experts.slots import Held, LayerSlots
from loader.experts.uses import Use


def stream(
    slots: LayerSlots,
    experts: Sequence[int],
    state: CacheState,
    look_ahead: Callable[[], None],
    *,
    ascending: bool,
) -> Iterator[dict[int, Tensor]]:
    """The different `experts`, in the order of their last use, in parts: number -> uint8 [n_bytes].

    A part is valid until the next one is asked for, and then for what the caller's stream had been
    given. Parts come as experts arrive, or with `ascending` in ascending order over all; where
    copies are queued, one by one, so that the next ones go on while one is used. Each expert is
    read at most once. Afterwards the slots hold the last used, as if the tokens had come one by one
    (with `ascending` as far as no expert has to leave before its turn).

    `look_ahead` is called before the last part, when the disk has no more to do for this layer.
    Errors as `formats.reading.reader.Load`.
    """
    use, changes = _Stream(slots, experts, state, ascending), state.changes
    try:
        with changes.lock, changes:
            use.begin()
        while use.todo:
            begin_s = time.perf_counter()
            part = changes.until(use.next_part)
            state.waited(time.perf_counter() - begin_s)
            blobs = {entry.expert: blob_of(entry) for entry in part}
            use.todo = [expert for expert in use.todo if expert not in blobs]
            if not use.todo:
                look_ahead()
            slots.before_use(blobs.values())
            yield blobs
            with changes.lock, changes:
                use.end_part(part)
    finally:
        # Where the garbage collector closes it within a change, the next change finds that nobody
        # refers to `use`.
        if not changes.is_here:
            with changes.lock, changes:
                use.end()


class _Stream(Use):
    """The experts of a stream: `held` until they are used, then `kept` until the end, to be the
    last used.
    """

    __slots__ = ("_ascending", "_experts", "_keep", "_kept", "_slots", "_state", "todo")

    def __init__(
        self, slots: LayerSlots, experts: Sequence[int], state: CacheState, ascending: bool
    ) -> None:
        super().__init__()
        self._slots, self._experts, self._state, self._ascending = slots, experts, state, ascending
        self._keep = frozenset(experts[max(0, len(experts) - slots.slots) :])
        self._kept: list[Held] = []
        self.todo = sorted(experts)
        """Those that are yet to be used."""

    def begin(self) -> None:
        """Pins what is there."""
        self._state.begin(self)
        there = [self._slots.held[expert] for expert in self._experts if expert in self._slots.held]
        for entry in there:
            self._pin(entry)
        self._slots.hits += len(there)

    def next_part(self) -> list[Held] | None:
        """What can be computed now, experts that are there or failed; begins to read what has room."""
        self._begin_reads()
        part = self._part()
        if not part and not any(entry.job for entry in self.entries):
            # Nothing moves.
            self._state.make_room()
            self._begin_reads()
            # What is only queued is there at once, and nobody will tell.
            part = self._part()
        return part or None

    def end_part(self, part: Sequence[Held]) -> None:
        """Ends the use of what was computed, but for what stays in slots."""
        self._slots.after_use(part)
        # What leaves first: it makes room for what stays.
        for entry in sorted(part, key=lambda entry: entry.expert in self._keep):
            if entry.expert in self._keep:
                self._slots.keep(entry, self._keep)
            if entry.expert in self._keep and self._slots.is_in_slot(entry):
                self._kept.append(entry)
            else:
                self.entries.remove(entry)
                self._slots.end(entry)
        self._state.changes.ring()

    def end(self) -> None:
        """Ends it all, in the order of use."""
        if not self._state.uses.holds(self):
            return
        left = [entry for entry in self.entries if entry not in self._kept]
        self._slots.after_use(left)
        self._state.uses.end(self)
        for entry in (
            *left,
            *sorted(self._kept, key=lambda entry: self._experts.index(entry.expert)),
        ):
            self._slots.end(entry)
        self._slots.drop_guesses()
        self._state.changes.ring()

    def _pin(self, entry: Held) -> None:
        self.entries.append(entry)
        entry.pins += 1

    def _begin_reads(self) -> None:
        pinned = {entry.expert for entry in self.entries}
        # Guesses first, which take room already; but in a fixed order what is later must not take
        # the room of the next.
        outside = self._slots.outside
        order = (
            self.todo
            if self._ascending
            else sorted(self.todo, key=lambda expert: expert not in outside)
        )
        for expert in order:
            if expert not in pinned:
                entry = self._slots.take(expert, self._keep)
                if entry is None:
                    return
                self._pin(entry)

    def _part(self) -> list[Held]:
        held = {entry.expert: entry for entry in self.entries}
        entries = [held[expert] for expert in self.todo if expert in held]
        if self._ascending:
            there = takewhile(lambda expert: expert in held and not held[expert].job, self.todo)
            entries = [held[expert] for expert in there]
            entries = list(takewhile(lambda entry: not entry.queued, entries)) or entries[:1]
        return arrived(entries)
