"""Experts' packed bytes in memory: an LRU cache of slots in each layer, with prefetch.

- *Slot*: memory for one expert of a layer (`slots.py`). *Cache*: the slots of all layers
  (`cache.py`).
- *Hit*, *miss*: a token's expert that has a slot, or that must be read. *Eviction*: a slot is taken
  from the expert that the policy chooses (`policy.py`).
- *Lease*: the experts of one token in one layer, pinned while they are used (`lease.py`).
- *Prefetch*: reads of experts that the next layer will probably need (`prefetch.py`), by the
  threads of the fetcher (`fetcher.py`).

Invariants: a pinned expert is not evicted. A demand read goes before every prefetch. After an
interrupt at any line the cache is consistent (`cache_state.py`, `changes.py`).
"""
