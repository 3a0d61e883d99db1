"""Solvers: from a weight matrix to packed tiles with the smallest error.

- *Solver*: the protocol (`protocol.py`). `registry.py` lists solvers by name: hqq, hqq-package,
  refit, feedback, none.
- *HQQ*: half-quadratic quantization of each group (`hqq_native.py`, `hqq_package.py`).
- *Refit*: scales by range search and least squares. *Feedback*: each column's rounding error is
  carried to the columns after it (GPTQ). Both use the input statistics of `converter/calibration`.

Invariants: a solver without its native library gives the result of its torch reference within the
stated tolerance. The same input gives the same bytes.
"""
