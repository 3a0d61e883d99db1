"""The original's forward pass by transformers' own layers, with one decoder layer in memory at a
time.

- *stream*: the hidden states between two decoder layers, float32 [windows, window, hidden].
- *call*: the arguments that the model gives a decoder layer besides the stream: masks, position
  embeddings.
- *outer model*: the model without its decoder layers: what comes before the first and after the
  last.
- *loaded layer*: a decoder layer whose weights are read, but for its experts'.
- *piece*: tokens of one expert that go through it together.

Invariants: a layer's arithmetic is transformers' own, whatever the model type; only the experts are
computed here, from slices of their matrices. Calls depend on the length of the windows and on
nothing else: a model whose calls depend on tokens or hidden states is refused. Everything is
float32, but for products with large matrices where asked for. Work is cut into parts of fixed size,
and every sum has one order: the same numbers for any number of workers.
"""
