"""Products of packed weights on the CPU.

- *Backend*: the interface of products (`backend.py`); native (`native_backend.py`), native with
  14-bit activations for gradients (`precise_backend.py`), or torch, the reference
  (`torch_product.py`).
- *Kernels*: the native functions, their arguments checked (`kernels.py`); the library
  (`native_library.py`).
- *Plain experts*: experts in 16 bits (`plain_experts.py`).

Invariants: backends differ by rounding only (docs/numerics.md). An address goes to a kernel only
after type, shape and strides were checked.
"""
