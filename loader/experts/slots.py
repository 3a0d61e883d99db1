"""Requests for one layer's experts: hits, misses, prefetches and fills. The owner has a lock."""

from collections.abc import Collection, Iterable
from functools import partial

from torch import Tensor

from loader.experts.cache_entry import CacheEntry
from loader.experts.fetcher import Fetcher, Job
from loader.experts.policy import Policy
from loader.experts.reader_protocol import Load, Reader
from loader.experts.slot_table import SlotTable, Staging


class LayerSlots(SlotTable):
    """The slots of one layer, filled by the reads of `fetcher`."""

    def __init__(
        self,
        layer: int,
        slots: int,
        policy: Policy,
        staging: Staging,
        reader: Reader,
        fetcher: Fetcher,
    ) -> None:
        super().__init__(layer, slots, policy, staging, reader)
        self._fetcher = fetcher

    def take(self, expert: int, keep: Collection[int]) -> CacheEntry | None:
        """Return the entry of `expert`, and start its read if it is missing.

        The expert gets a slot if no expert of `keep` has to leave for it, otherwise it is staged.
        Another expert is evicted only for an expert of `keep`. None if there is no room now.
        """
        if entry := self.cached.get(expert):
            return entry
        if expert in keep:
            into_slot = self._can_free(keep)
        else:
            into_slot = len(self.cached.keys() | set(keep)) < self.slots
        if entry := self.staged.get(expert):
            self._demand(entry)
            if into_slot:
                self._move_in(entry, keep)
            return entry
        if not into_slot and self.staging.is_full:
            return None
        # Evict before reading: memory stays within the budget at every moment.
        if into_slot:
            self._free_slot(keep)
        entry = self._start(expert)
        if into_slot:
            self.cached[expert] = entry
        else:
            self._stage(entry)
        if entry.error:
            self._leave(entry)
        return entry

    def keep(self, entry: CacheEntry, keep: Collection[int]) -> None:
        """Move a staged entry of `keep` into a slot if one can be freed. Called before `end`."""
        # An entry whose read failed is in neither dict.
        is_staged = self.staged.get(entry.expert) is entry
        if is_staged and entry.pins == 1 and self._can_free(keep):
            self._move_in(entry, keep)

    def end(self, entry: CacheEntry) -> None:
        """End a use, the layer's latest so far. A staged entry leaves with its last use."""
        entry.pins -= 1
        entry.is_queued = False
        if entry.blob is not None and self.has_slot(entry):
            self._policy.touch(entry.expert)
        elif entry.blob is not None and not entry.pins:
            self._leave(entry)

    def guess(self, expert: int) -> bool:
        """Prefetch `expert` if it is missing. False if the staging area is full."""
        if expert in self.cached or expert in self.staged:
            return True
        if self.staging.is_full:
            return False
        entry = self._start(expert, urgent=False)
        entry.is_guess = True
        self._stage(entry)
        self.count(guesses=1)
        return True

    def fill(self, expert: int) -> None:
        """Count a miss that was computed elsewhere, and read the expert into a slot in background.

        Nothing is read while another fill is under way, or if the staging area is full. Demand
        reads go first.
        """
        self.count(misses=1, cpu_experts=1)
        filling = self.staging.filling
        is_busy = filling is not None and filling.job is not None
        is_known = expert in self.cached or expert in self.staged
        if is_busy or is_known or self.staging.is_full:
            return
        entry = self._start(expert, urgent=False)
        self.staging.filling = entry
        entry.is_fill = True
        self._stage(entry)

    def drop_guesses(self, fills: bool = False) -> None:
        """Cancel prefetches that nobody asked for; with `fills` also the fills."""
        for entry in list(self.staged.values()):
            if not (entry.is_guess or (fills and entry.is_fill)):
                continue
            if entry.job:
                self._fetcher.cancel(entry.job)
            else:
                self.count(wasted_bytes=self._reader.moved_bytes(self.layer, entry.expert))
                self._leave(entry)

    def before_use(self, blobs: Iterable[Tensor]) -> None:
        """Call `Reader.before_use`."""
        self._reader.before_use(blobs)

    def after_use(self, entries: Iterable[CacheEntry]) -> None:
        """Call `Reader.after_use` for the entries that have bytes."""
        self._reader.after_use([entry.blob for entry in entries if entry.blob is not None])

    def _start(self, expert: int, urgent: bool = True) -> CacheEntry:
        """Begin to read `expert`; an urgent read counts as a miss."""
        pool = self.staging.pool
        in_place = self._reader.in_place(self.layer, expert)
        buffer = None if in_place or pool is None else pool.take()
        entry = CacheEntry(expert, buffer)
        load = self._reader.load(self.layer, expert, buffer)
        if urgent:
            self._count_miss(expert)
            self.count(delays=self._fetcher.guess_is_running)
        if urgent and load.at_once:
            _run_now(entry, load)
        else:
            job = Job(load, urgent, partial(self._finished, entry), buffer)
            self._fetcher.submit(job)
            entry.job = job
        return entry

    def _count_miss(self, expert: int) -> None:
        self.count(misses=1, bytes_read=self._reader.moved_bytes(self.layer, expert))

    def _demand(self, entry: CacheEntry) -> None:
        """Turn a prefetch or a fill into a demand read."""
        if entry.is_guess or entry.is_fill:
            self._count_miss(entry.expert)
        if entry.is_guess:
            if entry.job:
                early_bytes = entry.job.load.done
            else:
                early_bytes = self._reader.moved_bytes(self.layer, entry.expert)
            self.count(useful_guesses=1, early_bytes=early_bytes)
        entry.is_guess = False
        entry.is_fill = False
        if entry.job:
            self._fetcher.promote(entry.job)

    def _finished(
        self, entry: CacheEntry, blob: Tensor | None, error: BaseException | None
    ) -> None:
        job, entry.job = entry.job, None
        entry.blob = blob
        entry.error = error
        if job:
            entry.is_queued = job.load.queued
            job.load.close()
        if blob is None:
            if job and (entry.is_guess or entry.is_fill):
                self.count(wasted_bytes=job.load.done)
            self._leave(entry)
        elif entry.is_fill:
            entry.is_fill = False
            self._fill_slot(entry)
        elif self.has_slot(entry) and not entry.pins:
            # The thread that asked for it was interrupted.
            self._policy.touch(entry.expert)
        elif not self.has_slot(entry) and not entry.pins and not entry.is_guess:
            self._leave(entry)

    def _fill_slot(self, entry: CacheEntry) -> None:
        self.count(bytes_read=self._reader.moved_bytes(self.layer, entry.expert))
        if self._can_free(()):
            self._move_in(entry, ())
            self._policy.touch(entry.expert)
        else:
            self._leave(entry)


def _run_now(entry: CacheEntry, load: Load) -> None:
    """Run a load that only queues a copy: waking a reading thread would take longer."""
    try:
        load.step()
        entry.blob = load.result()
        entry.is_queued = load.queued
    except BaseException as e:
        entry.error = e
    load.close()
