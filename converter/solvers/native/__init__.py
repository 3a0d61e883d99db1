"""Python side of libmoe_solver, the native library of solvers (C++ in `converter/native`).

- *Place*: the tiles of a matrix that one call writes, and where in the output (`tile_place.py`).
- *Factor*: upper triangular root of the damped Hessian; error feedback needs it.
- *Metric*: what a row's gain is measured in: the Hessian, or a low-rank part and a diagonal.

Invariants: every ISA gives the same bytes. Tensors are checked before their addresses reach C++.
Calls that write different tiles of one matrix may run in several threads.
"""
