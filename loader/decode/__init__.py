"""One token of one sequence through a whole model, from its number to its logits.

- *Decoder*: computes such a token over packed weights, on the CPU (`cpu.py`) or on a GPU
  (`loader/cuda/decode/gpu_decoder.py`). It leases each layer's experts from the cache between the
  two halves of the layer: attention and router, experts.
- *Path*: who computed a token: `decoder`, or `transformers` (transformers' own code over packed
  modules). `decoder-experts`, transformers' attention with native experts, is reserved for families
  without a decoder.
- *Reason*: why a token took the path `transformers` (`paths.py`).

Invariants: a decoder uses no weight or setting that has changed since it was made: `Signature`
(`weights.py`) is compared before each token. For every token that a decoder takes, transformers'
code gives the same logits up to rounding (docs/numerics.md).
"""
