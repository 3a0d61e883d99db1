"""Model repositories on the Hub: files, byte ranges, experts fetched on demand.

- *Repo*: a repository pinned to a commit (`repo.py`).
- *Range*: bytes [begin, end) of one of its files (`ranges.py`).
- *Lazy folder*: a converted folder of which only some experts are on disk (`lazy_folder.py`),
  filled by its reader (`lazy_reader.py`).

Invariants: only this room talks to huggingface_hub. A byte is fetched once, and compared with the
index before use.
"""
