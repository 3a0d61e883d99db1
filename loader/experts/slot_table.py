"""The table of a layer's slots: who has one, who is staged, who leaves. The owner has a lock."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from loader.experts.buffers import BufferPool, Piece
from loader.experts.cache_entry import CacheEntry
from loader.experts.policy import Policy
from loader.experts.reader_protocol import Reader
from loader.experts.stats import LayerStats


class Staging:
    """Room for experts of one size that have no slot, shared by several layers.

    room: experts that fit. used: experts in it now. pool: the buffers of its layers, of slots and
    staging; None if experts are used where their files are mapped.
    """

    def __init__(self, room: int, pool: BufferPool | None) -> None:
        self.room = room
        self.pool = pool
        self.used = 0
        self.filling: CacheEntry | None = None
        """The latest fill (`CacheEntry.is_fill`)."""

    @property
    def is_full(self) -> bool:
        """True if no further expert fits."""
        return self.used >= self.room


class SlotTable:
    """The slots of one layer and its share of the staging area.

    An expert with a slot leaves it only for another expert; `policy` chooses which one leaves.
    """

    def __init__(
        self, layer: int, slots: int, policy: Policy, staging: Staging, reader: Reader
    ) -> None:
        self.layer = layer
        self.slots = slots
        self.staging = staging
        self.cached: dict[int, CacheEntry] = {}
        """Experts with a slot, by number. An expert whose read fails leaves."""
        self.staged: dict[int, CacheEntry] = {}
        """Experts in the staging area, by number."""
        self.stats = LayerStats()
        self.hits = 0
        """Requests for experts that had a slot; the other counters are in `stats`."""
        self._policy = policy
        self._reader = reader
        self._experts = reader.artifact.architecture.num_local_experts

    def count(self, **counts: int) -> None:
        """Add to the counters of these names."""
        sums = {name: getattr(self.stats, name) + n for name, n in counts.items()}
        self.stats = replace(self.stats, **sums)

    @property
    def max_experts(self) -> int:
        """Experts that fit at the same time if no other layer uses the staging area."""
        return self.slots + self.staging.room

    @property
    def removable_slots(self) -> int:
        """Number of slots that `remove_slot` can remove now."""
        return self.slots - len(self._fixed())

    def has_room_for(self, experts: Collection[int]) -> bool:
        """True if all of `experts` fit at the same time now."""
        wanted = {expert for expert in experts if expert in self.cached}
        missing = [expert for expert in experts if expert not in self.cached]
        free_slots = self.slots - len(self._fixed() | wanted)
        free_staging = self.staging.room - self.staging.used
        already_staged = sum(expert in self.staged for expert in missing)
        return len(missing) - free_slots <= free_staging + already_staged

    def has_slot(self, entry: CacheEntry) -> bool:
        """True if `entry` has a slot; otherwise it is staged, or has left."""
        return self.cached.get(entry.expert) is entry

    def entries(self) -> list[CacheEntry]:
        """Return all entries: with a slot, staged, or on their way."""
        return [*self.cached.values(), *self.staged.values()]

    def remove_slot(self) -> bool:
        """Remove one slot, and evict an expert if all slots are taken. False if all are in use."""
        if not self.slots or not self._can_free(()):
            return False
        self._free_slot(())
        self.slots -= 1
        return True

    def clear(self, piece: Piece) -> None:
        """Evict the experts in `piece`, none of which is in use; the slots stay."""
        for entry in [entry for entry in self.cached.values() if self._is_in(piece, entry)]:
            self._evict(self.cached.keys() - {entry.expert})
            self.count(evictions=1)

    def uses(self, piece: Piece) -> bool:
        """True if memory of `piece` is in use."""
        return any(entry.is_fixed and self._is_in(piece, entry) for entry in self.entries())

    def repair(self, pins: Mapping[CacheEntry, int]) -> None:
        """Make the table consistent after an interrupted change; `pins` are the true pin counts.

        Entries without bytes and without a read leave, and so do staged entries that nobody needs.
        The owner repairs jobs and buffers afterwards.
        """
        for entry in self.entries():
            entry.pins = pins.get(entry, 0)
        for expert, entry in list(self.cached.items()):
            if entry.blob is None and not entry.job:
                del self.cached[expert]
        for expert, entry in list(self.staged.items()):
            is_needed = entry.job or (entry.blob is not None and (entry.pins or entry.is_guess))
            if expert in self.cached or not is_needed:
                del self.staged[expert]
        self._policy.settle(
            [expert for expert, entry in self.cached.items() if entry.blob is not None]
        )

    def _fixed(self) -> set[int]:
        return {expert for expert, entry in self.cached.items() if entry.is_fixed}

    def _is_in(self, piece: Piece, entry: CacheEntry) -> bool:
        pool = self.staging.pool
        if entry.buffer is None or pool is None:
            return False
        return pool.piece_of(entry.buffer) is piece

    def _can_free(self, keep: Collection[int]) -> bool:
        if len(self.cached) < self.slots:
            return True
        unmovable = self._fixed().union(keep) & self.cached.keys()
        return len(unmovable) < len(self.cached)

    def _free_slot(self, keep: Collection[int]) -> None:
        if len(self.cached) >= self.slots:
            self._evict(keep)
            self.count(evictions=1)

    def _evict(self, keep: Collection[int]) -> None:
        entry = self.cached.pop(self._policy.victim(self._fixed().union(keep)))
        self._release(entry)

    def _stage(self, entry: CacheEntry) -> None:
        self.staging.used += 1
        self.staged[entry.expert] = entry

    def _move_in(self, entry: CacheEntry, keep: Collection[int]) -> None:
        """Move a staged entry into a slot; no expert of `keep` makes room for it."""
        self._free_slot(keep)
        # An interrupt must not find a running read in neither dict: its buffer would be missing
        # until the read ends. `repair` removes an entry of both from `staged`.
        self.cached[entry.expert] = entry
        del self.staged[entry.expert]
        self.staging.used -= 1

    def _leave(self, entry: CacheEntry) -> None:
        # Compared by identity: an interrupted entry is in neither dict, and another entry for the
        # same expert may have come since.
        if self.has_slot(entry):
            del self.cached[entry.expert]
        elif self.staged.get(entry.expert) is entry:
            del self.staged[entry.expert]
            self.staging.used -= 1
        self._release(entry)

    def _release(self, entry: CacheEntry) -> None:
        if entry.buffer is None and self.slots < self._experts:
            self._reader.forget(self.layer, entry.expert)
        elif entry.buffer is not None and self.staging.pool:
            self.staging.pool.give_back(entry.buffer)
        entry.buffer = None
        entry.blob = None
