"""Loading by name: transformers' from_pretrained and pipeline take converted models.

A finder waits for transformers' import (`import_hook.py`), then entries go into its registries
(`registration.py`, `registry_entry.py`); `load_by_name.py` loads, with transformers' arguments
translated (`arguments.py`, `device_map.py`).
"""
