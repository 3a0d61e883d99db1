"""Repair of a converted folder: damaged bytes are replaced from an origin.

- *Origin*: source of the right bytes of an expert or a file: a published model
  (`formats/hub/hub_origin.py`) or the source checkpoint (`converter/source_origin.py`).
- *Rebuild*: the index written again from the other files (`index_rebuild.py`).

Invariants: bytes are written only if they have the index's sha256. A rebuilt index states only
facts that the files show.
"""
