"""Calibration: measures on the original's activations which rounding errors matter.

- *Calibration tokens*: windows of a text, or random tokens, each with a weight
  (`calibration_text.py`).
- *Statistics* of a linear: second moments of its inputs over these tokens
  (`converter/input_statistics.py`, summed in `moments.py`).
- *Statistics* of a layer: those of its linears and experts. Those of an expert are computed when
  the expert is quantized (`layer_statistics.py`).
- *Pass*: takes the tokens through the decoder layers in ascending order. Each layer is gathered,
  then quantized, then finished (`calibration_pass.py`).
- *State*: file from which an interrupted pass continues: the activations after the last finished
  layer (`state_file.py`).
- *Sensitivity*: output error of each layer at each number of bits, measured in a separate pass over
  fewer tokens (`bit_sensitivity.py`).

Invariants: the results depend on checkpoint, tokens and instruction set, not on workers or
interruptions. Memory does not depend on the number of layers (`pass_memory.py` has the formula).
"""
