"""One conversion, from its plan to its index.

- *Plan*: every decision before the first weight is read. A dry run and a conversion make the same
  plan (`plan.py`).
- *Flow*: the order of the steps; it continues or skips finished work (`flow.py`).
- *Identity*: what two conversions must share to continue one another (`identity.py`).
- *Unit*: one piece of work: quantize an expert, quantize a trunk matrix, or copy a tensor
  (`units.py`). Its result is bytes and a record (`converter/journal`).
- *Worker*: computes a unit's bytes and record (`worker.py`).
- *Run*: the remaining units, in several threads (`run.py`). Completion then writes the remaining
  files, the index last (`completion.py`).

Invariants: the number of workers, their order and interruptions do not change a byte. A unit's
bytes are durable before its record. Workers write no files; `converter/output` writes them and
knows no weights. A folder without an index is not complete.
"""
