"""A checkpoint: its model's shape, its tensors by role, its weights.

- *decoder layer*: one of the model's blocks, with or without experts, counted from 0.
- *expert layer*, or only *layer*: the ordinal of a decoder layer among those that have experts.
  Files, index and recipes count these.
- *experts module*: the module of all routed experts of one decoder layer.
- *trunk*: every tensor that is not a routed expert's.
- *role*: the part of the model that a stored tensor is: one expert's projection, one projection of
  all experts of a layer, or a tensor of the trunk (`names.py`).

Invariants: transformers' class of the model gives names, sizes and layers; no file here lists them
for a model type. Only `conversion_table.py` uses transformers' private conversion table.
"""
