"""Loads libmoe_solver and declares its C ABI (converter/native/solver_api.h) to ctypes."""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint32, c_void_p

from converter.solver_errors import NonFiniteWeightsError, UnfitWeightsError
from formats.errors import MoeConvertError
from formats.install import build_native, reinstall
from formats.native.abi import ISA_NAMES, Status
from formats.native.libraries import Signatures, load_library

LIBRARY = "libmoe_solver.so"
ABI_VERSION = 4
RESULT_VERSION = 3
"""Version of the bytes that native solvers write. Each change of a result adds one: resume and
repair from the source then refuse older folders.
"""


class ScaleOverflowError(UnfitWeightsError):
    """A row's super-scale exceeds fp16 (65504), because the weights are too large."""

    def __init__(self) -> None:
        super().__init__("a row's super-scale exceeds fp16's 65504")


class NativeSolverError(MoeConvertError):
    """The library is missing, out of memory, or lacks the requested ISA."""


class Weights(ctypes.Structure):
    """The C structure moe_weights."""

    _fields_ = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


class Tiles(ctypes.Structure):
    """The C structure moe_tiles."""

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
    """The C structure moe_metric."""

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
    """True if the library is installed and runs here."""
    return _load()[0] is not None


def describe() -> str:
    """Return one line: the ISA and path of the library, or why it is missing and what to do."""
    loaded, path_or_reason = _load()
    if loaded is None:
        return f"no native solver: {path_or_reason}; {build_native()}"
    return f"native, {ISA_NAMES[loaded.moe_solver_isa()]}; {path_or_reason}"


def library() -> ctypes.CDLL:
    """Return the library; raise NativeSolverError with the install command if it is missing."""
    loaded, _ = _load()
    if loaded is None:
        raise NativeSolverError(describe(), reinstall())
    return loaded


@functools.cache
def packing_id(name: str) -> int:
    """Return the number by which the library knows a tile packing."""
    number: int = library().moe_packing_id(name.encode())
    return number


def raise_for(status: int, isa: str, non_finite: int = 0) -> None:
    """Raise the exception for a status that is not OK.

    isa: the requested one. non_finite: number of weights that are infinite or NaN. Both are for the
    message.
    """
    if status == Status.OK:
        return
    if status == Status.NON_FINITE:
        raise NonFiniteWeightsError(non_finite)
    if status == Status.OVERFLOW:
        raise ScaleOverflowError
    if status == Status.MEMORY:
        raise NativeSolverError(
            "the native solver cannot allocate its scratch memory",
            "use fewer workers: --max-workers N",
        )
    if status == Status.ISA:
        raise NativeSolverError(
            f"the instruction set {isa} is missing in this processor or build", 'use isa="auto"'
        )
    raise ValueError("the native solver refused its arguments")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and its path, or None and the reason why it is missing."""
    return load_library("converter", LIBRARY, ("moe_solver_abi", ABI_VERSION), _SIGNATURES)
