"""Modules over packed weights that replace transformers' own in a loaded model.

- *Packed linear*: a linear layer of the trunk; `packed_weight.py` has its `weight` without values.
- *Cached experts*: all experts of a layer, read from the expert cache (`packed_modules.py`).
- *Native head*: the output head over bfloat16 weights (`head.py`).
- *Routed layer*: a layer's experts with its router and norm (`expert_layers.py`).

Invariants: a module returns the dtype of its input and sums in float32. The size of the cache
changes no bit of a result.
"""
