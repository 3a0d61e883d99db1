"""The journal: a file in the output folder that records finished work, so that a run can resume.

- *Fingerprint*: source, recipe, codec and code versions of the conversion; the journal's first
  line. `converter/conversion/identity.py` computes it.
- *Record*: a finished unit, a complete layer file, or the hash of a source shard (`records.py`).
- *Key*: identifies the subject of a record (`keys.py`). A later record replaces an earlier one
  with the same key.
- *Journal*: the file: one line with a checksum for each record (`journal_file.py`).
- *Finished work*: the latest record of each key (`finished_work.py`).

Invariants: bytes are durable before their record. A damaged record counts as not written.
"""
