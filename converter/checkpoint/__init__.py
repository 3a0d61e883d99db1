"""A checkpoint's model, as transformers' own class says it.

- *decoder layer*: one of the model's blocks, with or without experts, counted from 0.
- *expert layer*, or only *layer*: the ordinal of a decoder layer among those that have experts.
  Files, index and recipes count these.
- *experts module*: the module of all routed experts of one decoder layer.
- *trunk*: every tensor that is not a routed expert's.
- *role*: what a tensor of the checkpoint is in the model: an expert's projection, a projection of
  all experts of a layer, or a tensor of the trunk.

Names, sizes and layers of no model type are written down here: transformers is asked. Only
`conversion_table` uses what is private there.
"""
