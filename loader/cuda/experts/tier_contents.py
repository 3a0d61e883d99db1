"""The experts in the tier: reads into it, uses, evictions, and copies that still read from it."""

import threading
from collections import deque
from dataclasses import replace

from formats.artifact import Artifact
from formats.reading.reader import ExpertReader
from loader.budget.expert_sizes import expert_bytes_by_layer
from loader.cuda.device.device import Event
from loader.cuda.experts.page_locked import PageLockedMemory
from loader.cuda.experts.tier_pool import TierEntry, TierPool
from loader.experts.buffers import Memory
from loader.experts.stats import TierStats

CHECK_EVERY_S = 1.0
"""Seconds between two searches for abandoned uses while a read waits for a buffer."""


class TierContents:
    """The experts of a `PinnedTier`, for it and its `TierUse`s. Thread safe, without a thread.

    counts: number of buffers by expert size in bytes.
    """

    def __init__(
        self,
        reader: ExpertReader,
        counts: dict[int, int],
        memory: PageLockedMemory,
        piece_bytes: int,
    ) -> None:
        self.artifact: Artifact = reader.artifact
        # An interrupt within Condition.__enter__, which is Python code, would keep the lock.
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._reader = reader
        self._memory = memory
        self._sizes = expert_bytes_by_layer(reader.artifact)
        pieces = Memory(memory.allocate, piece_bytes, lazy=True)
        self._pools = {
            size: TierPool(size, counts[size], self._sizes.count(size), pieces)
            for size in sorted(set(self._sizes))
        }
        self._entries: dict[tuple[int, int], TierEntry] = {}
        self._copies: deque[tuple[Event, TierEntry]] = deque()
        """Uses that end with a copy, in the order in which the copies were queued."""
        n_bytes = sum(pool.count * pool.buffers.buffer_bytes for pool in self._pools.values())
        self.stats = TierStats(buffer_bytes=n_bytes)

    def pool(self, layer: int) -> TierPool:
        """Return the pool of a layer's experts."""
        return self._pools[self._sizes[layer]]

    def find(self, layer: int, expert: int) -> TierEntry | None:
        """Return an expert and count a hit; None if it is missing or still being read.

        The caller holds `lock` and adds the use to `users`.
        """
        entry = self._entries.get((layer, expert))
        if entry is None or entry.blob is None:
            return None
        entry.pool.touch(entry)
        self._count(hits=1)
        return entry

    def open(self, layer: int, expert: int, use: object) -> TierEntry:
        """Return the entry of an expert for `use`, and begin its read if it is missing.

        Evicts an expert if the pool is full, or waits until a use or a copy ends.
        """
        key = layer, expert
        pool = self.pool(layer)
        with self.lock:
            while True:
                if entry := self._entries.get(key):
                    entry.users.add(use)
                    return entry
                self.end_copies()
                if pool.buffers.is_empty:
                    self._repair(pool)
                if not pool.buffers.is_empty:
                    break
                if victim := pool.evict({entry for _, entry in self._copies}):
                    del self._entries[victim.key]
                    pool.buffers.give_back(victim.buffer)
                    self._count(evictions=1)
                elif self._copies:
                    self._wait_for_a_copy()
                else:
                    # The end of an abandoned use notifies nobody.
                    self._changed.wait(CHECK_EVERY_S)
            buffer = pool.buffers.take()
            entry = TierEntry(key, pool, buffer, self._reader.load(layer, expert, buffer))
            entry.users.add(use)
            self._entries[key] = entry
            self._count(misses=1, bytes_read=self.artifact.entry(layer, expert).length)
            return entry

    def step(self, entry: TierEntry, at_most: int | None) -> int:
        """Read up to `at_most` bytes (None: all), and return how many were read.

        Raises the errors of `formats.reading.reader.Load`.
        """
        with entry.lock:
            if entry.blob is not None:
                return 0
            read = entry.load.step(at_most)
            if not entry.load.remaining:
                blob = entry.load.result()
                with self.lock:
                    entry.blob = blob
                    layer, expert = entry.key
                    experts = self.artifact.architecture.num_local_experts
                    entry.pool.add(entry, layer * experts + expert)
            return read

    def is_pinned(self, entry: TierEntry) -> bool:
        """True if the expert's buffer is page-locked."""
        return self._memory.is_pinned(entry.pool.buffers.piece_of(entry.buffer).memory)

    def end(self, use: object, entry: TierEntry, copy: Event | None) -> None:
        """End a use: now, or when the event `copy` is reached."""
        with self.lock:
            if copy:
                self._copies.append((copy, entry))
            entry.users.discard(use)
            self._drop_unread(entry)
            self._changed.notify_all()

    def end_copies(self) -> None:
        """Forget the copies that are over. The caller holds `lock`."""
        while self._copies and self._copies[0][0].query():
            self._copies.popleft()

    def close(self) -> None:
        """Close the reader and unlock the memory. No copy may be running."""
        with self.lock:
            self._reader.close()
            self._memory.unpin_all()

    def _drop_unread(self, entry: TierEntry) -> None:
        """Free the buffer of an entry without bytes and users: its read failed or was given up."""
        if entry.blob is None and not entry.users and self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            entry.pool.buffers.give_back(entry.buffer)

    def _repair(self, pool: TierPool) -> None:
        """Return buffers to the pool that an interrupt kept from being returned."""
        for entry in list(self._entries.values()):
            self._drop_unread(entry)
        pool.buffers.repair(entry.buffer for entry in self._entries.values())

    def _wait_for_a_copy(self) -> None:
        copy = self._copies[0]
        self.lock.release()
        try:
            copy[0].synchronize()
        finally:
            self.lock.acquire()
            if copy in self._copies:
                self._copies.remove(copy)
            self._changed.notify_all()

    def _count(self, **counts: int) -> None:
        added = {name: getattr(self.stats, name) + n for name, n in counts.items()}
        self.stats = replace(self.stats, **added)
