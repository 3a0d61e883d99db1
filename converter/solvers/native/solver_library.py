"""Finds and loads libmoe_solver, and declares its C ABI (converter/native/solver_api.h) to ctypes."""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint32, c_void_p

from converter.solver_errors import NonFiniteWeightsError, UnfitWeightsError
from formats.errors import MoeConvertError
from formats.native.abi import ISA_NAMES, Status
from formats.native.libraries import Signatures, load_library

LIBRARY = "libmoe_solver.so"
ABI_VERSION = 4
RESULT_VERSION = 3
"""Raised by one when any solver writes other bytes: a resume and a repair from the source then
refuse.
"""


class ScaleOverflowError(UnfitWeightsError):
    """Weights so large that a row's super-scale exceeds fp16 (65504)."""

    def __init__(self) -> None:
        super().__init__("a row's super-scale exceeds fp16's 65504")


class NativeSolverError(MoeConvertError):
    """The library is missing, of another version, out of memory, or lacks the wanted ISA."""


class Weights(ctypes.Structure):
    """moe_weights."""

    _fields_ = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


class Tiles(ctypes.Structure):
    """moe_tiles."""

    _fields_ = [
        ("begin", c_int64),
        ("end", c_int64),
        ("out", c_void_p),
        ("stride_bytes", c_int64),
        ("errors", c_void_p),
        ("non_finite", c_int64),
        ("packing", c_int32),
        ("reserved", c_int32),
    ]


class Metric(ctypes.Structure):
    """moe_metric."""

    _fields_ = [
        ("factor", c_void_p),
        ("factor_block", c_int64),
        ("order", c_void_p),
        ("importance", c_void_p),
        ("diagonal", c_void_p),
        ("pairing", c_void_p),
        ("low_rank", c_void_p),
        ("rank", c_int64),
        ("damping", c_void_p),
    ]


_SIGNATURES: Signatures = {
    "moe_solver_isa": (c_int32, []),
    "moe_packing_id": (c_int32, [c_char_p]),
    "moe_quantize": (c_int32, [POINTER(Weights), POINTER(Tiles), c_uint32, c_int32]),
    "moe_refit": (c_int32, [POINTER(Weights), POINTER(Tiles), POINTER(Metric), c_uint32, c_int32]),
    "moe_hqq": (
        c_int32,
        [POINTER(Weights), c_int32, c_int32, c_uint32, c_int32, c_void_p, c_void_p, c_void_p],
    ),
}


def available() -> bool:
    """Whether the library is there and can be used."""
    return _find()[0] is not None


def describe() -> str:
    """One line: which code runs and where it lies, or why none does and what to do."""
    found, reason = _find()
    if found is None:
        return f"no native solver: {reason}; install a C++20 compiler and reinstall moe-convert"
    return f"native solver, {ISA_NAMES[found.moe_solver_isa()]} ({reason})"


def library() -> ctypes.CDLL:
    """The library. NativeSolverError, saying how to get it, where it is not there."""
    found, _ = _find()
    if found is None:
        raise NativeSolverError(
            describe(), "pip install --force-reinstall --no-binary moe-convert moe-convert"
        )
    return found


@functools.cache
def packing_id(name: str) -> int:
    """The library's number of a tile packing."""
    number: int = library().moe_packing_id(name.encode())
    return number


def raise_for(status: int, isa: str, non_finite: int = 0) -> None:
    """The exception for a status that is not OK. isa, non_finite: for its message."""
    if status == Status.OK:
        return
    if status == Status.NON_FINITE:
        raise NonFiniteWeightsError(non_finite)
    if status == Status.OVERFLOW:
        raise ScaleOverflowError
    if status == Status.MEMORY:
        raise NativeSolverError(
            "the native solver found no memory for its scratch", "use fewer workers"
        )
    if status == Status.ISA:
        raise NativeSolverError(f"this processor or this build has no {isa} path", 'use isa="auto"')
    raise ValueError("the native solver refused its arguments")


@functools.cache
def _find() -> tuple[ctypes.CDLL | None, str]:
    """The library and its path, or None and the reason why there is none."""
    return load_library("converter", LIBRARY, ("moe_solver_abi", ABI_VERSION), _SIGNATURES)
