"""Repair of a converted folder: damaged bytes are replaced from an origin.

- *Origin*: gives the right bytes of an expert or a file: a published model
  (`formats/hub/hub_origin.py`) or the source checkpoint (`converter/source_origin.py`).

Invariants: bytes are written only if they have the sha256 of the index; an index that is rebuilt
(`index_rebuild.py`) says only what the files show.
"""
