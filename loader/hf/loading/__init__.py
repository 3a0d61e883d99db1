"""Builds a transformers model or tokenizer from a folder.

- *Gated config*: the fields of config.json that `formats/config` accepts. `configuration.py` makes
  transformers' configuration objects from them.
- *Plugin*: a quantizer of transformers that replaces modules before weights are loaded
  (`plugin.py`). `index_comparison.py` compares the model with the index and the trunk.
- *View*: a temporary folder of links to the files that the index lists (`listed_files.py`).
- *Plain checkpoint*: an unconverted checkpoint, loaded for comparison (`plain_checkpoint.py`).
- *Tokenizer*: `tokenizer.py` loads one and checks its token ids.

Invariants: of a converted folder, transformers reads only files that the index lists. It gets only
gated configuration fields, and it runs no code from a folder.
"""
