"""Files of this machine: safe names, locks, durable writes, and the system's errors.

- *Output file*: a file under construction, `.partial` until it is complete (`output_file.py`).
- *Overlap*: an output that would damage an input (`overlap.py`).

Invariants: no file is written through a link. A complete file appears under its name at once,
durably. Each error of the operating system names the file and the next step (`io_errors.py`).
"""
