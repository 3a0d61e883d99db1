"""Everything of the loader that meets transformers' generation and forward: its class, caches,
inputs, private names.

- *Served class*: a subclass of a family's causal model that serves its experts from a cache
  (`model_class.py`).
- *Serving*: what such a model has besides modules: cache, decoder, counters (`serving.py`).
- *Registry entry*: what stands in transformers' registry of Auto classes for a model type
  (`registry_entry.py`).
- *Growing cache*: a DynamicCache whose layers append in place (`growing_cache.py`).

Invariants: no object of transformers is patched, and no class of an object is exchanged. A name
that transformers does not document stands in `private_names.py` only.
"""
