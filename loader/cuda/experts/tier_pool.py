"""The tier's buffers for experts of one size, and the policy that evicts from them."""

import threading
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from formats.reading.reader import Load
from loader.experts.buffers import BufferPool, Memory
from loader.experts.policy import LrfuPolicy

HALF_LIFE = 64.0
"""Half-life of the eviction policy, in uses by each layer (loader/experts/policy.py)."""


@dataclass(eq=False)
class TierEntry:
    """An expert in the tier (`blob`), or being read into it (`load`). Not evicted while it is used.

    users: open `TierUse`s. Weak references: a use that an interrupt kept from being closed ends
    when nothing refers to it.
    """

    key: tuple[int, int]
    """(layer, expert)."""
    pool: "TierPool"
    buffer: Tensor
    load: Load
    blob: Tensor | None = None
    users: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a step of `load` runs."""


class TierPool:
    """`count` buffers for experts of `size` bytes, with one eviction policy for all layers.

    Experts that stay in a GPU's slots age here, because the tier sees only GPU misses. Not thread
    safe: the owner has a lock.
    """

    def __init__(self, size: int, count: int, layers: int, memory: Memory) -> None:
        """layers: number of layers whose experts have this size."""
        self.count = count
        self.buffers = BufferPool(size, count, memory)
        self._policy = LrfuPolicy(HALF_LIFE * layers)
        self._numbers: dict[tuple[int, int], int] = {}
        """Number for the policy by (layer, expert)."""
        self._entries: dict[int, TierEntry] = {}
        """Entries with bytes, by number."""

    def add(self, entry: TierEntry, number: int) -> None:
        """Make a read expert known to the policy under its `number`, and count a use."""
        self._numbers[entry.key] = number
        self._entries[number] = entry
        self.touch(entry)

    def touch(self, entry: TierEntry) -> None:
        """Count a use of the expert."""
        self._policy.touch(self._numbers[entry.key])

    def evict(self, copied: Collection[TierEntry]) -> TierEntry | None:
        """Remove an expert and return it; None if all are in use or being copied (`copied`)."""
        fixed = {
            number for number, entry in self._entries.items() if entry.users or entry in copied
        }
        if len(fixed) == len(self._entries):
            return None
        return self._entries.pop(self._policy.victim(fixed))
