"""How transformers loads a converted folder: configuration, file list, quantizer plugin, tokenizer.

Invariants: transformers sees only files that the index lists and config fields that the gates of
`formats/config` let through; it runs no code from the folder.
"""
