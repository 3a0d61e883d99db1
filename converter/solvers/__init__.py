"""Solvers: from a weight matrix to packed tiles with a small error.

- *Solver*: the interface of all solvers (`interface.py`). `registry.py` lists them by name: hqq,
  hqq-package, refit, feedback. The module of a solver has its name.
- *HQQ*: half-quadratic quantization of each group (`hqq.py`, `hqq_package.py`).
- *Refit*: scales by range search and least squares (`refit.py`). *Feedback*: refit that carries
  each column's rounding error to the columns after it, as GPTQ does (`feedback.py`).
- *Input statistics*: second moments of a linear layer's inputs (`input_statistics.py`).
  `converter/calibration` computes them and feedback uses them.
- *Reference*: the same algorithm in torch (`*_reference.py`). It replaces the native library
  (`native/`) if there is none, and tests compare both.

Invariants: the same input and solver version give the same bytes. Rows do not depend on each other.
"""
