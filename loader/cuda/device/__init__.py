"""A GPU: memory, streams, compiled kernels, and the self-check before a model relies on it.

`device.py` is the protocol; `torch_device.py` implements it by torch and the driver. Tests record
its calls.
"""
