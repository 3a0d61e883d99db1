"""Decoding one token on a GPU, with launches that are prepared once.

- *Decoder*: runs a token through all layers (`gpu_decoder.py`); `decoder_factory.py` makes it.
- *Layer step*: a layer's launches up to the router's choice, seven of them (`gpu_layer.py`).
- *Token memory*: buffers and changing numbers that all layers share (`token_memory.py`);
  `argument_structures.py` mirrors the structures of kernel arguments among them.
- *Span*: the 512 positions of the KV cache that one block of the attention kernel computes.
- *CPU part*: experts that the CPU computes, and the copy of their sum to the GPU (`cpu_part.py`).

Invariants: results have the bits of the CPU decoder (docs/numerics.md). The host waits once for
each layer, for the router's choice, and for experts that are not in memory.
"""
