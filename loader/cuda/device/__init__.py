"""One GPU: memory, streams, events, copies and kernel launches.

- *Device*: the protocol that the rest of loader/cuda calls (`device.py`). `torch_device.py`
  implements it with torch and CUDA's driver (`driver.py`); tests implement it with a recorder.
- *Compute stream*: the stream of torch's operations and of our launches. *Copy stream*: a stream
  of its own for copies of experts.
- *Prepared launch*: a kernel with its grid and arguments, called once for each token.
- *Cubin*: compiled kernels for one GPU generation; NVRTC makes it (`nvrtc.py`).

Invariants: a prepared launch keeps its tensors alive. Only `synchronize` makes the host wait, and
copies from memory that is not page-locked.
"""
