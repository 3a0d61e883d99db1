"""Decoding one token of one sequence natively, from its id to its logits.

- *Decoder*: computes such a token over packed weights, on the CPU (`cpu.py`) or on a GPU
  (`loader/cuda/decode/gpu_decoder.py`); `decoder.py` has the protocol. A layer has two halves:
  attention and router, then experts. In between the decoder leases the experts from the cache.
- *Spec*: where a model type keeps its weights and settings (`specs.py`, and a file for each type).
  Both decoders read them through it into `ModelWeights` (`weights.py`).
- *Block*: 16 positions of one head in a KV cache of 8 bits (`kv_blocks.py`); `kv_bits_check.py`
  refuses models that cannot have one.
- *Request*: what a call of the model asks for (`decoder_call.py`).
- *Path*: the code that computed a token: `decoder`, or `transformers` (transformers' own code over
  packed modules). `decoder_experts` is reserved for model types without a decoder.
- *Reason*: why a token took the path `transformers` (`path_counters.py`).

Invariants: a decoder never uses weights or settings that changed after it was made; `Signature`
(`weights.py`) is compared before each token. For every token of a decoder, transformers' code gives
the same logits up to rounding (docs/numerics.md).
"""
