"""Adapters of PEFT, merged into the weights of a checkpoint as they are read.

- *Adapter*: a folder with adapter_config.json and adapter_model.safetensors, local or on the Hub
  (`adapter_folder.py`).
- *Change*: what an adapter does to one tensor of the model: it adds a product of two small matrices
  (LoRA), or replaces the tensor (`modules_to_save`) (`changes.py`).

Invariants: PEFT's own code decides which modules an adapter changes, converts its names, and
computes each merged value; this room only cuts the work into rows (`peft_layers.py`). So the merged
rows have the same bytes as after PEFT's `merge_and_unload`. Nothing in an adapter is ignored: an
option, tensor or shape that does not fit is refused. A pickle is never read.
"""
