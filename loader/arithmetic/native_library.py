"""Finds and loads libmoe_kernels, and declares its C ABI (loader/native/moe_kernels.h) to ctypes.

The first call loads the library, not the import. If it is missing, one warning is logged.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p

from formats.install import build_native
from formats.native.libraries import Signatures, load_library

_log = logging.getLogger(__name__)

ABI_VERSION = 6


class Matrix(ctypes.Structure):
    """moe_matrix."""

    _fields_ = [
        ("tiles", c_void_p),
        ("rows", c_int64),
        ("y", c_void_p),
        ("packing", c_int32),
        ("reserved", c_int32),
    ]


class Expert(ctypes.Structure):
    """moe_expert."""

    _fields_ = [
        ("blob", c_void_p),
        ("tokens", c_void_p),
        ("weights", c_void_p),
        ("token_count", c_int64),
        ("gate_up_packing", c_int32),
        ("down_packing", c_int32),
    ]


class LayerExperts(ctypes.Structure):
    """moe_layer_experts."""

    _fields_ = [
        ("blobs", c_void_p),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("count", c_int32),
        ("gate_up_packing", c_int32),
        ("down_packing", c_int32),
        ("reserved", c_int32),
    ]


class Routing(ctypes.Structure):
    """moe_routing."""

    _fields_ = [
        ("index", c_void_p),
        ("weights", c_void_p),
        ("tokens", c_int64),
        ("top_k", c_int32),
        ("reserved", c_int32),
    ]


class Attention(ctypes.Structure):
    """moe_attention."""

    _fields_ = [
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("o", Matrix),
        ("hidden", c_int64),
        ("head_dim", c_int64),
        ("scale", c_float),
        ("dtype", c_int32),
    ]


class KvCache(ctypes.Structure):
    """moe_kv."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("length", c_int64),
        ("format", c_int32),
        ("reserved", c_int32),
    ]


class Layer(ctypes.Structure):
    """moe_layer."""

    _fields_ = [
        ("attention", Attention),
        ("attention_norm", c_void_p),
        ("experts_norm", c_void_p),
        ("router", c_void_p),
        ("intermediate", c_int64),
        ("attention_eps", c_float),
        ("experts_eps", c_float),
        ("experts", c_int32),
        ("top_k", c_int32),
        ("gate_up_packing", c_int32),
        ("down_packing", c_int32),
    ]


class Model(ctypes.Structure):
    """moe_model."""

    _fields_ = [
        ("layers", c_void_p),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("vocabulary", c_int64),
        ("head", Matrix),
        ("eps", c_float),
        ("count", c_int32),
        ("experts", c_int32),
        ("top_k", c_int32),
    ]


class Token(ctypes.Structure):
    """moe_token."""

    _fields_ = [
        ("id", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_void_p),
        ("length", c_int64),
        ("blobs", c_void_p),
        ("room", c_void_p),
        ("index", c_void_p),
        ("weights", c_void_p),
        ("out", c_void_p),
        ("halves_done", c_int32),
        ("kv_format", c_int32),
    ]


_P, _I, _L = c_void_p, c_int32, c_int64
_SIGNATURES: Signatures = {
    "moe_set_threads": (_I, [_I]),
    "moe_threads": (_I, []),
    "moe_isa": (_I, []),
    "moe_isa_reason": (c_char_p, []),
    "moe_set_isa": (_I, [_I]),
    "moe_packed_bytes": (_L, [_I, _L, _L]),
    "moe_expert_bytes": (_L, [_I, _I, _L, _L]),
    "moe_packing_id": (_I, [c_char_p]),
    "moe_linear": (_I, [_I, _P, _L, _L, _P, _P, _L]),
    "moe_linear_many": (_I, [POINTER(Matrix), _I, _L, _P, _L]),
    "moe_linear_bf16": (_I, [_P, _L, _L, _P, _P, _L]),
    "moe_experts": (_I, [POINTER(Expert), _I, _L, _L, _P, _P, _L, _I]),
    "moe_experts_topk": (_I, [POINTER(LayerExperts), POINTER(Routing), _P, _P, _I]),
    "moe_attention_step": (_I, [POINTER(Attention), _P, _P, _P, POINTER(KvCache), _P]),
    "moe_token_step": (_I, [_P, _P]),
    "moe_stream_sum": (c_uint64, [_P, _I, _L, _L]),
    "moe_empty_region_us": (c_double, [_I]),
}


@functools.lru_cache(maxsize=1)
def find() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and its path, or None and the reason, which is logged once."""
    name = "libmoe_kernels.dylib" if sys.platform == "darwin" else "libmoe_kernels.so"
    loaded, reason = load_library("loader", name, ("moe_abi_version", ABI_VERSION), _SIGNATURES)
    if loaded is None:
        _log.warning(
            "%s; the torch path runs instead, which is much slower. To fix it: %s",
            reason,
            build_native(),
        )
    return loaded, reason


def library() -> ctypes.CDLL:
    """Return the library. RuntimeError, saying how to get it, if it is missing."""
    loaded, reason = find()
    if loaded is None:
        raise RuntimeError(f"{reason}; {build_native()}")
    return loaded


@functools.lru_cache(maxsize=64)
def packing_id(name: str) -> int:
    """Return the library's number of a tile packing. ValueError for an unknown name."""
    number = int(library().moe_packing_id(name.encode()))
    if number < 0:
        raise ValueError(
            f"unknown packing {name!r}; the native library knows the tile32-* packings of"
            " docs/format.md"
        )
    return number
