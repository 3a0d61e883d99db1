"""Gates for JSON from strangers: config.json, generation_config.json, tokenizer files.

- *Gate*: takes the fields that a model type declares, each with its rule, and refuses or drops the
  others (`config_gate.py`, `generation_config.py`).
- *Rule*: type and range of one field, and the form that transformers takes (`field_rules.py`).
- *Model type*: transformers' name of an architecture. `model_types.py` lists the tested ones.
- *Side file*: a file beside the weights, such as a tokenizer, template or licence
  (`side_files.py`).

Files: `strict_json.py` parses; `checkpoint_config.py` reads a source's config.json,
`recorded_config.py` a converted folder's.

Invariants: no field that selects code reaches transformers. Every number is bounded before a size
is computed from it.
"""
