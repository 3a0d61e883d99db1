"""The output of a conversion: the folder, its files under construction, their sizes.

- *Output folder*: owned by one process at a time (`output_folder.py`), probed before the first
  weight is read (`output_probe.py`).
- *Output files*: the trunk and layer files, `.partial` until complete (`output_files.py`).
- *Side files*: the source's files without weights (`source_side_files.py`).
- *Sizes*: bytes, memory and disk of a conversion, known from headers alone (`conversion_sizes.py`).

Invariants: the index is written last; a folder without it is not complete.
"""
