"""Files on this machine: safe names, locks, durable writes, and errors of the operating system.

- *Output file*: a file opened for writing, never through a link (`output_file.py`).
- *Partial file*: a new file under its `.partial` name, until it is complete (`partial_file.py`).
- *Overlap*: an output that would overwrite an input (`overlap.py`).

Invariants: no file is written through a link. A complete file appears under its name atomically and
durably. Every error of the operating system names the file and the next step (`io_errors.py`).
"""
