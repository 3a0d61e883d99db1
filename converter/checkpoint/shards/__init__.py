"""The bytes of a source's shards: in a folder, or in a Hub repository.

- *Shard*: one safetensors file of a checkpoint.
- *Shard index*: model.safetensors.index.json, which names the shard of each tensor
  (`shard_index.py`).
- *Shard source*: gives byte ranges of shards, from a folder (`shard_source.py`) or a repository
  (`hub_shards.py`).
- *Fetched shards*: shards of a repository on disk, fetched ahead and deleted after use, within a
  disk limit (`fetched_shards.py`).

Invariants: nothing in a source's folder or in the user's cache is changed or deleted. A fetched
shard is compared with the Hub's hash before use.
"""
