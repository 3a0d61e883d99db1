"""Structures of kernel arguments between products, as loader/cuda/kernels declares them.

They hold addresses: the caller keeps the tensors alive. Launches that are prepared with a structure
read its fields at each call, so its owner may change them for each token.
"""

from ctypes import Structure, c_float, c_int64, c_void_p

from torch import Tensor


class TokenHeads(Structure):
    """One token's q, k, v, rotary embedding and position (attention.cuh)."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("position", c_int64),
    )


class KvPlace(Structure):
    """Addresses of a layer's keys and values, and their capacity in positions (attention.cuh)."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("capacity", c_int64))

    def set(self, place: tuple[int, int, int]) -> None:
        """Set all fields from the result of `KvLayer.place`."""
        self.keys, self.values, self.capacity = place


class HeadShape(Structure):
    """Query heads for each KV head, head width, and scale of the scores (attention.cuh)."""

    _fields_ = (("group", c_int64), ("dim", c_int64), ("scale", c_float))


class SpanSums(Structure):
    """Results of the attention kernel for each span (attention.cuh)."""

    _fields_ = (("acc", c_void_p), ("top", c_void_p), ("total", c_void_p))


class Guess(Structure):
    """The next layer's router, and how many of its experts to guess (router.cuh)."""

    _fields_ = (("router", c_void_p), ("count", c_int64))

    def set(self, ahead: tuple[Tensor, int] | None) -> None:
        """Set both fields from the result of `ExpertSource.router_ahead`; None: no guess."""
        self.router = None if ahead is None else ahead[0].data_ptr()
        self.count = 0 if ahead is None else ahead[1]
