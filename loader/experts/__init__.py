"""The expert cache: experts' packed bytes in memory, in slots of each layer, with prefetch.

- *Slot*: room for one expert of a layer (`slot_table.py`, `slots.py`). *Cache*: the slots of all
  layers (`cache.py`).
- *Staging*: room beside the slots for experts that are being read or used once (`slot_table.py`).
- *Hit*: a request for an expert that has a slot. *Miss*: the expert must be read. *Eviction*: an
  expert loses its slot to another one; the policy chooses which one (`policy.py`).
- *Pin*: an expert with pins is in use and is not evicted (`pins.py`).
- *Lease*: the pinned experts of one token in one layer (`lease.py`). *Stream*: the same for many
  tokens, one expert after the other (`streaming.py`).
- *Prefetch*, *guess*: a read of an expert that the next layer will probably need (`prefetch.py`).
- *Fetcher*: the threads that read (`fetcher.py`), through a reader (`reader_protocol.py`).
- *Monitor*: lock and condition over the state, with repair after an interrupt (`monitor.py`,
  `cache_state.py`).

Invariants: a pinned expert is not evicted. A demand read goes before every prefetch. Memory never
exceeds slots plus staging. After an interrupt at any line, the next change finds or makes a
consistent cache.
"""
