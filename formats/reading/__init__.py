"""Readers of experts' bytes, and the checks of stored bytes.

- *Reader*: gives an expert's packed bytes, by mmap (`mmap_reader.py`) or by direct reads past the
  page cache (`direct_reader.py`). `readers.py` lists them by name.
- *Check*: the comparison of stored bytes with the index: none, fast (xxh3) or full (sha256).
- *Verification*: the structure of a whole folder, and on request every byte of it (`verify.py`).

Invariants: no byte of an expert is used before its check. A fork waits for direct reads under way
(`fork_gate.py`).
"""
