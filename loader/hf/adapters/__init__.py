"""PEFT's adapters on a loaded model.

- *Adapter*: small trained weights beside the model's own, such as LoRA's two matrices.
- *Target*: a module or parameter of the model that gets an adapter.

Invariants: an adapter is refused before PEFT changes a module, if it names packed experts or needs
the values of packed weights. No named target is ignored. PEFT is never imported here: the check
is added when the user imports it.
"""
