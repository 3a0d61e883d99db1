"""KV caches that answers leave behind, for later prompts with the same first tokens.

- *Prefix cache*: a KV cache with the tokens it holds (`prefix_cache.py`).
- *Prefix store*: prefix caches of finished answers, an LRU bounded in bytes (`prefix_store.py`).

Invariants: a prefix cache has one owner at a time, the store or a generation. After an interrupt it
holds exactly the tokens that it reports.
"""
