"""The bytes of a source's shards: in a folder, in a Hub repository, or on disk for a while.

- *Shard*: one safetensors file of a checkpoint.
- *Shard source*: gives byte ranges of shards (`shard_source.py`, `hub_shards.py`).
- *Fetched shards*: shards of a repository, fetched ahead and deleted after use, within a disk limit
  (`fetched_shards.py`).
"""
