"""Model repositories on the Hub: files, byte ranges, experts fetched on demand.

- *Repo*: a repository pinned to a commit (`repo.py`, with the commit's files from
  `revision_files.py`).
- *Writer*: commits to a branch of a repository (`repo_writer.py`).
- *Range*: bytes [begin, end) of a file (`ranges.py`).
- *Download*: a whole file, resumed and checked (`download.py`).
- *Lazy folder*: a converted folder that has only some of its experts (`lazy_folder.py`), filled by
  its reader (`lazy_reader.py`).

Invariants: only this room imports huggingface_hub. Each byte is fetched once, and compared with the
index before use. Errors carry neither tokens nor requests.
"""
