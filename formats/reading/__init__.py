"""Readers of experts' bytes, and checks of stored bytes.

- *Reader*: gives experts' packed bytes, by mmap (`mmap_reader.py`) or by O_DIRECT past the page
  cache (`direct_reader.py`). `readers.py` lists the readers by name.
- *Load*: the read of one expert in steps, so that a more urgent read can go first (`reader.py`).
- *Check*: comparison of an expert's stored bytes with the index: fast (xxh3), sha256 or none.
- *Verification*: check of a whole folder's structure, optionally of every byte (`verify.py`).

Invariants: no byte of an expert is used before its check. A fork waits for running direct reads
(`fork_gate.py`).
"""
