"""Calibration: what the original's activations say of how to quantize it.

- *statistics* of a linear: the second moments of its inputs over the calibration's tokens, each
  token with its weight.
- *statistics* of a layer: those of its linears, and of each of its experts, computed when the
  expert's turn comes.
- *pass*: the tokens' way through the decoder layers, in ascending order, each gathered, quantized
  and finished.
- *state*: where an interrupted pass goes on: the activations after the last finished layer, with
  their sha256.
- *sensitivity*: what fewer bits cost each layer, measured by a pass of its own over fewer tokens.

Invariants: the numbers depend on checkpoint, tokens and instruction set, not on workers or
interruptions. Memory does not depend on the number of layers (`pass_memory` has the formula).
"""
