"""Models on CUDA GPUs: kernels over the packed bytes, and the copies that feed them.

Rooms, each using only those before it:

- `device/`: one GPU: memory, streams, events, kernel launches.
- `kernels/`: CUDA sources, which NVRTC compiles for the GPU at first use.
- `products/`: products of packed weights on a GPU.
- `experts/`: the expert cache of a model on GPUs.
- `decode/`: decoding one token on one GPU.

`device_choice.py` turns the option `device` into GPUs.
"""
