"""The original model's forward pass by transformers' own layers, one decoder layer at a time.

- *stream*: the hidden states between two decoder layers, float32 [windows, window, hidden].
- *call*: the arguments beside the stream that the model gives a decoder layer: masks, position
  embeddings.
- *outer model*: the model without its decoder layers: the part before the first and the part after
  the last.
- *loaded layer*: a decoder layer whose weights are in memory, except for its experts'.
- *piece*: tokens of one expert that go through it together.

Invariants:

- Transformers' own code computes each layer, for every model type. Only the experts are computed
  here, from slices of their matrices.
- Calls depend on the length of the windows only. A model whose calls depend on tokens or hidden
  states is refused.
- Everything is float32; products with large matrices may be bfloat16 where the caller asks for it.
- Work is cut into parts of fixed size, and every sum has one order: the results are the same for
  any number of workers.
"""
