"""Gates for JSON that comes from strangers: config.json, generation_config.json, tokenizer files.

- *Gate*: takes the fields that a model type declares, each with its rule, and refuses or drops the
  others.
- *Rule*: type and range of one field, and its form for transformers (`field_rules.py`).
- *Model type*: transformers' name of an architecture; those that are admitted are listed in
  `model_types.py`.

Invariants: no field that selects code reaches transformers. Each number is bounded before it sizes
anything.
"""
