"""Products of packed weights on the CPU.

- *Backend*: the interface of products (`backend.py`); native (`native_backend.py`), native with
  14-bit activations for gradients (`precise_backend.py`), or torch, the reference (`backend.py`,
  `torch_product.py`).
- *Kernels*: the native functions (`kernels.py`, `expert_table.py`, `experts_step.py`), with checked
  arguments (`kernel_arguments.py`); the library and its C ABI (`native_library.py`).
- *Plain experts*: experts in 16 bits (`plain_experts.py`).
- *Gradients*: autograd over packed weights (`gradients.py`, `expert_gradient.py`).
- *Machine*: measured speed of memory and disk (`machine.py`).

Invariants: backends differ by rounding only (docs/numerics.md). An address goes to a kernel only
after type, shape and strides were checked.
"""
