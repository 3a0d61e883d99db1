"""Many tokens' experts of a layer, each once: the next ones are read while the caller computes."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from torch import Tensor

from loader.experts.cache_entry import CacheEntry
from loader.experts.cache_state import CacheState
from loader.experts.lease import arrived, blob_of
from loader.experts.pins import PinHolder
from loader.experts.slots import LayerSlots


def stream(
    slots: LayerSlots,
    experts: Sequence[int],
    state: CacheState,
    look_ahead: Callable[[], None],
    *,
    ascending: bool,
) -> Iterator[dict[int, Tensor]]:
    """Yield the different `experts` in parts: number -> uint8 [n_bytes].

    experts: in the order of their last use.
    look_ahead: called before the last part, when the disk has nothing more to do for this layer.
    ascending: True yields the experts in ascending order; False yields them as they arrive.

    Each expert is read at most once. Experts whose copies are only queued come one by one, so that
    the next copies continue while one is used. A part is valid until the next one is asked for;
    work that the caller's stream has by then may still use it.

    Afterwards the slots hold the last used experts, as if the tokens had come one by one. With
    `ascending` this holds only if no expert has to leave before its turn.
    Raises the errors of `formats.reading.reader.Load`.
    """
    run = _Stream(slots, experts, state, ascending)
    monitor = state.monitor
    try:
        with monitor.lock, monitor:
            run.begin()
        while run.todo:
            begin_s = time.perf_counter()
            part = monitor.wait_for(run.next_part)
            state.count_wait(time.perf_counter() - begin_s)
            blobs = {entry.expert: blob_of(entry) for entry in part}
            run.todo = [expert for expert in run.todo if expert not in blobs]
            if not run.todo:
                look_ahead()
            slots.before_use(blobs.values())
            yield blobs
            with monitor.lock, monitor:
                run.end_part(part)
    finally:
        # The garbage collector may close the generator within a change. The next change then
        # finds that nobody refers to `run`, and releases its pins.
        if not monitor.is_here:
            with monitor.lock, monitor:
                run.end()


class _Stream(PinHolder):
    """The pins of a stream: on `entries`, of which `_kept` stay pinned to the end, to count as the
    last used.
    """

    __slots__ = ("_ascending", "_experts", "_keep", "_kept", "_slots", "_state", "todo")

    def __init__(
        self, slots: LayerSlots, experts: Sequence[int], state: CacheState, ascending: bool
    ) -> None:
        super().__init__()
        self._slots = slots
        self._experts = experts
        self._state = state
        self._ascending = ascending
        self._keep = frozenset(experts[max(0, len(experts) - slots.slots) :])
        self._kept: list[CacheEntry] = []
        self.todo = sorted(experts)
        """Experts that were not yielded yet."""

    def begin(self) -> None:
        """Pin the hits."""
        self._state.begin(self)
        cached = self._slots.cached
        hits = [cached[expert] for expert in self._experts if expert in cached]
        for entry in hits:
            self._pin(entry)
        self._slots.hits += len(hits)

    def next_part(self) -> list[CacheEntry] | None:
        """Start the reads that have room. Return the experts that can be used now, or None."""
        self._begin_reads()
        part = self._part()
        if not part and not any(entry.job for entry in self.entries):
            # No read is under way, so nothing would wake this thread.
            self._state.make_room()
            self._begin_reads()
            # A queued copy needs no notification either.
            part = self._part()
        return part or None

    def end_part(self, part: Sequence[CacheEntry]) -> None:
        """End the use of a part, except for experts that stay in slots."""
        self._slots.after_use(part)
        # Experts that leave go first: they make room for those that stay.
        for entry in sorted(part, key=lambda entry: entry.expert in self._keep):
            if entry.expert in self._keep:
                self._slots.keep(entry, self._keep)
            if entry.expert in self._keep and self._slots.has_slot(entry):
                self._kept.append(entry)
            else:
                self.entries.remove(entry)
                self._slots.end(entry)
        self._state.monitor.notify_all()

    def end(self) -> None:
        """Release all pins, in the order of use."""
        if not self._state.pins.has(self):
            return
        left = [entry for entry in self.entries if entry not in self._kept]
        kept = sorted(self._kept, key=lambda entry: self._experts.index(entry.expert))
        self._slots.after_use(left)
        self._state.pins.end(self)
        for entry in (*left, *kept):
            self._slots.end(entry)
        self._slots.drop_guesses()
        self._state.monitor.notify_all()

    def _pin(self, entry: CacheEntry) -> None:
        self.entries.append(entry)
        entry.pins += 1

    def _begin_reads(self) -> None:
        pinned = {entry.expert for entry in self.entries}
        order: Sequence[int] = self.todo
        if not self._ascending:
            # Prefetched experts first: they have their room already. In ascending order a later
            # expert must not take the room of the next one.
            staged = self._slots.staged
            order = sorted(self.todo, key=lambda expert: expert not in staged)
        for expert in order:
            if expert not in pinned:
                entry = self._slots.take(expert, self._keep)
                if entry is None:
                    return
                self._pin(entry)

    def _part(self) -> list[CacheEntry]:
        pinned = {entry.expert: entry for entry in self.entries}
        entries = [pinned[expert] for expert in self.todo if expert in pinned]
        if self._ascending:
            done = takewhile(lambda expert: expert in pinned and not pinned[expert].job, self.todo)
            entries = [pinned[expert] for expert in done]
            entries = list(takewhile(lambda entry: not entry.is_queued, entries)) or entries[:1]
        return arrived(entries)
