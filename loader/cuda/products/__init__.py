"""Products of packed weights on a GPU.

- *Acts*: activations quantized to int8, uint8 [tokens, blocks of 64 columns, 80 bytes].
- *h*: an expert's intermediate activations, silu(gate) · up, quantized.
- *Pair*: one token and one of its experts (`pairs.py`). *Group*: the pairs of one expert in a
  launch. *Pass*: the groups that one launch computes.
- *GEMV*: a product with 1 to 8 tokens. *GEMM*: a product with more, on tensor cores.

`packed_products.py` chooses kernels and grids for matrices and experts, `token_experts.py` for one
token's experts. `structures.py` mirrors the structures of the kernels' arguments.

Invariants: the arithmetic, and so every bit, is the CPU's (docs/numerics.md). Nothing here waits
for the GPU. Wrong dtypes, shapes and sizes raise ValueError before a launch.
"""
