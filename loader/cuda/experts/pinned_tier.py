"""Experts in page-locked RAM, between the files and a GPU: what its copies, and the CPU, read from."""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from formats.artifact import Artifact
from formats.reading.reader import ExpertReader, Load, aligned_bytes
from loader.budget.expert_sizes import expert_bytes_by_layer
from loader.experts.buffers import BufferPool, Memory
from loader.experts.policy import LrfuPolicy
from loader.experts.stats import TierStats

_log = logging.getLogger(__name__)

PIECE_BYTES = 512 << 20
"""What is page-locked at a time. torch would round each pinned allocation up to a power of two, and
a registration of everything would take seconds before the first token.
"""

LOOK_EVERY_S = 1.0
"""How long a wait for a buffer goes on before it looks for those that nobody uses any more."""

HALF_LIFE = 64.0
"""Of the policy, in uses by each layer (loader/experts/policy.py)."""


class CopyEvent(Protocol):
    """The part of `loader.cuda.device.device.Event` that the end of a use needs."""

    def query(self) -> bool:
        """Whether the copy is over."""

    def synchronize(self) -> None:
        """Waits until it is."""


@dataclass(eq=False)
class Entry:
    """An expert in the tier (`blob`) or on its way there (`load`). It stays while it has users.

    users: also those that an interrupt kept from ending: they are no longer among these once nobody
    refers to them.
    """

    key: tuple[int, int]
    pool: "Pool"
    buffer: Tensor
    load: Load
    blob: Tensor | None = None
    users: "weakref.WeakSet[TierUse]" = field(default_factory=weakref.WeakSet)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a step of `load` runs."""


class Pool:
    """The buffers for experts of one size, and who leaves them: one policy for all layers. The tier
    sees only what the GPU misses, so that an expert that lives there ages here.
    """

    def __init__(self, size: int, count: int, layers: int, memory: Memory) -> None:
        self.count, self.buffers = count, BufferPool(size, count, memory)
        self.policy = LrfuPolicy(HALF_LIFE * layers)
        self.numbers: dict[tuple[int, int], int] = {}
        """(layer, expert) -> its number for the policy."""
        self.entries: dict[int, Entry] = {}

    def touch(self, entry: Entry) -> None:
        """The expert is used."""
        self.policy.touch(self.numbers[entry.key])

    def evict(self, copied: Collection[Entry]) -> Entry | None:
        """The expert that leaves; None if all are used or being `copied`."""
        fixed = {number for number, entry in self.entries.items() if entry.users or entry in copied}
        return (
            None if len(fixed) == len(self.entries) else self.entries.pop(self.policy.victim(fixed))
        )


class PinnedTier:
    """A cache over `reader`, which it closes, of `counts` experts of each size
    (`expert_bytes_by_layer`).

    pin, unpin: page-lock memory, as `loader.cuda.device.device.Device`; where that is refused the
    tier goes on without, which it says once. Thread safe, with no thread of its own. Two buffers of
    a size are the least: one for a demand, one for a guess that gave way.
    """

    def __init__(
        self,
        reader: ExpertReader,
        counts: dict[int, int],
        pin: Callable[[Tensor], bool],
        unpin: Callable[[Tensor], None],
        *,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.artifact: Artifact = reader.artifact
        self._reader, self._pin, self._unpin = reader, pin, unpin
        # Not the condition's own __enter__, in whose Python code an interrupt would keep the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._sizes = expert_bytes_by_layer(reader.artifact)
        memory = Memory(self._allocate, piece_bytes, lazy=True)
        self._pools = {
            size: Pool(size, counts[size], self._sizes.count(size), memory)
            for size in sorted(set(self._sizes))
        }
        self._entries: dict[tuple[int, int], Entry] = {}
        self._copies: deque[tuple[CopyEvent, Entry]] = deque()
        """Uses that end with a copy, in the order of their beginning."""
        self._pinned: dict[int, Tensor] = {}
        """By address, pieces."""
        self._refused = False
        n_bytes = sum(pool.count * pool.buffers.buffer_bytes for pool in self._pools.values())
        self._stats = TierStats(buffer_bytes=n_bytes)

    def use(self, layer: int, expert: int) -> "TierUse":
        """Begins a use, to be closed. Waits for nothing."""
        with self._lock:
            self._end_copies()
            return TierUse(self, layer, expert, self._find(layer, expert))

    def find(self, layer: int, expert: int) -> "TierUse | None":
        """A use of an expert that is there, else None."""
        with self._lock:
            entry = self._find(layer, expert)
            return TierUse(self, layer, expert, entry) if entry else None

    def room(self, layer: int) -> int:
        """How many experts of a layer may be held beside at most: two stay for a demand, and a
        guess that gave way.
        """
        return self._pools[self._sizes[layer]].count - 2

    def stats(self) -> TierStats:
        """A snapshot of the counters."""
        with self._lock:
            return self._stats

    def reset_stats(self) -> None:
        """Sets the counters to zero."""
        with self._lock:
            self._stats = TierStats(buffer_bytes=self._stats.buffer_bytes)

    def close(self) -> None:
        """Closes the reader and unlocks the memory; no copy may be under way."""
        with self._lock:
            self._reader.close()
            for memory in self._pinned.values():
                self._unpin(memory)
            self._pinned.clear()

    # For TierUse.

    def open(self, layer: int, expert: int, use: "TierUse") -> Entry:
        """An expert that is there or is being read, or one that is read now, for `use`; waits for a
        buffer.
        """
        key = layer, expert
        pool = self._pools[self._sizes[layer]]
        with self._lock:
            while True:
                if entry := self._entries.get(key):
                    entry.users.add(use)
                    return entry
                self._end_copies()
                if pool.buffers.is_empty:
                    self._mend(pool)
                if not pool.buffers.is_empty:
                    break
                if victim := pool.evict({entry for _, entry in self._copies}):
                    del self._entries[victim.key]
                    pool.buffers.give_back(victim.buffer)
                    self._count(evictions=1)
                elif self._copies:
                    self._wait_for_a_copy()
                else:
                    # Nobody tells of a use that ends because nobody refers to it.
                    self._changed.wait(LOOK_EVERY_S)
            buffer = pool.buffers.take()
            entry = Entry(key, pool, buffer, self._reader.load(layer, expert, buffer))
            entry.users.add(use)
            self._entries[key] = entry
            self._count(misses=1, bytes_read=self.artifact.entry(layer, expert).length)
            return entry

    def step(self, entry: Entry, at_most: int | None) -> int:
        """Reads on. Errors as `formats.reading.reader.Load`."""
        with entry.lock:
            if entry.blob is not None:
                return 0
            read = entry.load.step(at_most)
            if not entry.load.remaining:
                blob = entry.load.result()
                with self._lock:
                    entry.blob = blob
                    layer, expert = entry.key
                    number = layer * self.artifact.architecture.num_local_experts + expert
                    entry.pool.numbers[entry.key] = number
                    entry.pool.entries[number] = entry
                    entry.pool.touch(entry)
            return read

    def is_pinned(self, entry: Entry) -> bool:
        """Whether its bytes are page-locked."""
        return entry.pool.buffers.piece_of(entry.buffer).memory.data_ptr() in self._pinned

    def end(self, use: "TierUse", entry: Entry, copy: CopyEvent | None) -> None:
        """Ends a use, now or with the copy."""
        with self._lock:
            if copy:
                self._copies.append((copy, entry))
            entry.users.discard(use)
            self._drop_unread(entry)
            self._changed.notify_all()

    def _find(self, layer: int, expert: int) -> Entry | None:
        entry = self._entries.get((layer, expert))
        if entry is None or entry.blob is None:
            return None
        entry.pool.touch(entry)
        self._count(hits=1)
        return entry

    def _drop_unread(self, entry: Entry) -> None:
        """Of one that was given up, or failed: the buffer is free, or found by `_mend`."""
        if entry.blob is None and not entry.users and self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            entry.pool.buffers.give_back(entry.buffer)

    def _mend(self, pool: Pool) -> None:
        """What interrupts kept from being given back."""
        for entry in list(self._entries.values()):
            self._drop_unread(entry)
        pool.buffers.repair(entry.buffer for entry in self._entries.values())

    def _end_copies(self) -> None:
        while self._copies and self._copies[0][0].query():
            self._copies.popleft()

    def _wait_for_a_copy(self) -> None:
        copy = self._copies[0]
        self._lock.release()
        try:
            copy[0].synchronize()
        finally:
            self._lock.acquire()
            if copy in self._copies:
                self._copies.remove(copy)
            self._changed.notify_all()

    def _allocate(self, n_bytes: int) -> Tensor:
        memory = aligned_bytes(n_bytes)
        if not self._refused:
            if self._pin(memory):
                self._pinned[memory.data_ptr()] = memory
            else:
                self._refused = True
                _log.warning(
                    "%d bytes of RAM could not be page-locked: copies to the GPU will be slower",
                    n_bytes,
                )
        return memory

    def _count(self, **counts: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + n for name, n in counts.items()}
        )


class TierUse:
    """One expert of a tier for as long as it is needed; for one thread at a time."""

    def __init__(self, tier: PinnedTier, layer: int, expert: int, entry: Entry | None) -> None:
        self._tier, self._key, self._entry = tier, (layer, expert), entry
        if entry:
            entry.users.add(self)
        self.done = 0
        """Bytes that it has read from the file."""

    @property
    def is_there(self) -> bool:
        """Whether `blob` may be used."""
        return self._entry is not None and self._entry.blob is not None

    @property
    def is_pinned(self) -> bool:
        """Whether a copy from `blob` needs no help of the processor."""
        return self._entry is not None and self._tier.is_pinned(self._entry)

    @property
    def blob(self) -> Tensor:
        """uint8 [n_bytes], read-only by agreement."""
        if self._entry is None or self._entry.blob is None:
            raise RuntimeError(f"layer {self._key[0]} expert {self._key[1]} is not there yet")
        return self._entry.blob

    def step(self, at_most: int | None = None) -> int:
        """Reads on, at most so many bytes; how many. Errors as `formats.reading.reader.Load`."""
        if self._entry is None:
            self._entry = self._tier.open(*self._key, self)
        read = self._tier.step(self._entry, at_most)
        self.done += read
        return read

    def close(self, copy: CopyEvent | None = None) -> None:
        """Ends the use; with `copy`, when that is over."""
        if self._entry is not None:
            entry, self._entry = self._entry, None
            self._tier.end(self, entry, copy)

    def __enter__(self) -> "TierUse":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
