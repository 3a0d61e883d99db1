"""The loader's interface to transformers.

- *Served class*: a subclass of a transformers causal model that reads its experts from a cache
  (`model_class.py`). `model_size.py` counts its packed weights.
- *Serving*: the expert cache, decoder and counters of one served model (`served_model.py`). It
  sends each forward pass to the decoder or to transformers' code.
- *Decoder path*: computes one token with the decoder, if the model and the call allow it
  (`decoder_path.py`). `listeners.py` finds hooks and replaced modules: the decoder would skip them.
- *Growing cache*: a DynamicCache whose layers append in place (`growing_cache.py`), with kv_bits 8
  in 8 bits (`eight_bit_layer.py`); then `required_cache.py` lets no call use another one.
  `cache_length.py` restores its length after a failed pass.
- *Generation inputs*: attention mask and positions for `generate`, extended in place
  (`generation_inputs.py`).

Rooms: `modules/` has the modules over packed weights; `loading/` builds a model from a converted
folder; `by_name/` makes transformers' Auto classes accept converted folders.

Invariants:
- Objects of transformers are neither patched nor given another class. Exceptions: modules are
  replaced while a model is loaded, and a plain DynamicLayer of a KV cache becomes a GrowingLayer
  or an EightBitLayer.
- transformers' private names (with a leading underscore) are used in `private_names.py` only.
"""
