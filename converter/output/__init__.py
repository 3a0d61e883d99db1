"""The output of a conversion: its folder, its files under construction, their sizes.

- *Sizes*: bytes, memory and disk of a conversion, from headers alone (`conversion_sizes.py`); from
  config.json alone, `planned_folder.py`.
- *Needs*: the names of all files to write, and the inputs that they must not replace
  (`output_needs.py`).
- *Output folder*: owned by one process at a time (`output_folder.py`), probed before the first
  weight is read (`output_probe.py`).
- *Output files*: the trunk and layer files, `.partial` until complete (`output_files.py`).
- *Side files*: the source's files without weights (`source_side_files.py`).

Invariants: the index is written last; a folder without it is not complete. Nothing of the source is
changed.
"""
