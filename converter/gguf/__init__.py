"""Export of a converted folder to GGUF, the file format of llama.cpp.

- *Type*: a ggml type (`gguf.GGMLQuantizationType`): a float type such as F16, or a block type.
- *K-quant*: a block type with superblocks of 256 columns: Q2_K, Q3_K, Q4_K.
- *Stacked tensor*: one matrix of all experts of a layer, [experts, rows, columns]. It has one type.
- *Repack*: bring codes and scales into the layout of a block type; the weights stay equal.
- *Requantize*: compute new codes and scales from the weights; the weights change.

Invariants: a type that changes weights is chosen by the user, or reported as rounding of float16.
One expert is in memory at a time. The same folder and options give the same bytes.

The modules import the package gguf, which the extra `gguf` installs.
"""

RUN_HINT = "run the folder with moe-convert generate or moe-convert serve"
"""Next step for a model that cannot be exported."""
