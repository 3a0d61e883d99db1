"""The native solver: HQQ, rounding to S and M, and packing in one call to libmoe_solver.so (converter/native/)."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.solver import NonFiniteWeightsError, SquaredError, UnfitWeightsError
from formats.errors import MoeConvertError
from formats.libraries import library_paths
from formats.packing import PACKINGS, Packing, tile_packing_named, tiles_of

LIBRARY = "libmoe_solver.so"
ABI = 3  # moe_solver_abi() of converter/native/solver.cpp

ISAS = {"auto": -1, "portable": 0, "avx2": 1, "avx512": 2}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PACKING_IDS = {name: i for i, name in enumerate(PACKINGS)}  # `Packing` in formats/native/tile_layout.h
_ROUND_ZERO, _STATIC = 1, 4
_OK, _NON_FINITE, _OVERFLOW, _NO_MEMORY, _NO_ISA = 0, 2, 3, 4, 5


class ScaleOverflowError(UnfitWeightsError):
    """Weights so large that a row's super-scale exceeds fp16 (65504)."""

    def __init__(self) -> None:
        super().__init__("a row's super-scale exceeds fp16's 65504")


class NativeSolverError(MoeConvertError):
    """The library is missing, of another version, out of memory, or lacks the wanted ISA."""


@dataclass(frozen=True)
class QuantizeError:
    """Sums over a matrix, in fp64: of (weight - dequantized)² and of weight²."""

    sum_squared_error: float
    sum_squares: float

    @classmethod
    def total(cls, tile_errors: Sequence[Tensor]) -> "QuantizeError":
        """The sum over tiles (fp64 [tiles, 2] each), in order: the same number however tiles were dealt to threads."""
        error = squares = 0.0
        for tile_error, tile_squares in torch.cat(list(tile_errors)).tolist():
            error += tile_error
            squares += tile_squares
        return cls(error, squares)


@dataclass(frozen=True)
class HqqGroups:
    """HQQ's own result: `w = (codes - zero)·scale`.

    codes: uint8 [rows, columns]; scale, zero: float32 [rows, groups].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


class NativeSolver:
    """Quantizes by the native library, hundreds of Mweights a second and core; the same bytes on every ISA."""

    version = f"native {ABI}"
    bytes_a_weight = 4

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """As `Solver.solve`."""
        stride_tiles = tiles.stride(0) // tiles.shape[1]
        flat = tiles.as_strided(((len(tiles) - 1) * tiles.stride(0) + tiles.shape[1],), (1,))
        error = quantize_matrix(weight, packing.name, flat, stride_tiles=stride_tiles)
        return SquaredError(error.sum_squared_error, error.sum_squares)


def available() -> bool:
    """Whether the library is there and can be used."""
    return isinstance(_load(), ctypes.CDLL)


def describe() -> str:
    """One line: which code runs and where it lies, or why none does and what to do."""
    library = _load()
    if not isinstance(library, ctypes.CDLL):
        return library
    isa = library.moe_solver_isa()
    name = next(name for name, value in ISAS.items() if value == isa)
    return f"native solver, {name} ({library._name})"


def quantize_tiles(
    weight: Tensor,
    packing: str,
    out: Tensor,
    *,
    tile_begin: int = 0,
    tile_end: int | None = None,
    stride_tiles: int = 1,
    refit: bool = False,
    importance: Tensor | None = None,
    isa: str = "auto",
) -> Tensor:
    """Quantizes tiles `tile_begin`..`tile_end`-1 of a matrix into `out`; several threads may share a matrix.

    weight: [rows, columns] float32, bfloat16 or float16 on the CPU, contiguous: always the whole matrix.
    out: uint8 [n], contiguous; tile `tile_begin` goes to its front and each next one `stride_tiles` tiles later
    (2 interleaves gate and up). What lies between is not touched.
    refit: scales by a search over ranges and least squares, S, M and super-scales by the error they cause, and each
    row's gain restored; without it the bytes are those of plain HQQ with nearest rounding (solver_package.py).
    importance: with refit, float32 [columns] of positive weights of the columns' squared errors, in any unit.
    isa: a key of ISAS; all give the same bytes.
    Returns fp64 [tiles, 2], a tile's sum of squared errors and of squares: see `QuantizeError.total`.
    Raises NonFiniteWeightsError, ScaleOverflowError (both ValueErrors), NativeSolverError, and ValueError for tensors
    of a wrong dtype, shape or layout.
    """
    place = check_place(weight, packing, out, tile_begin, tile_end, stride_tiles)
    errors = torch.zeros(place.count, 4 if refit else 2, dtype=torch.float64)
    if not place.count:
        return errors[:, :2]
    if refit:
        refit_tiles(weight, out, place, errors, importance=importance, isa=isa)
        return errors[:, :2]
    if importance is not None:
        raise ValueError("importance needs refit=True: HQQ has none")
    non_finite = ctypes.c_int64(0)
    status = _library().moe_quantize(
        *place.arguments(weight, out), 0, ISAS[isa], errors.data_ptr(), ctypes.byref(non_finite)
    )
    _raise_for(status, non_finite.value, isa)
    return errors


@dataclass(frozen=True)
class TilePlace:
    """Which tiles of a matrix go where, checked."""

    packing: Packing
    tile_begin: int
    tile_end: int
    stride_bytes: int

    @property
    def count(self) -> int:
        """Tiles."""
        return self.tile_end - self.tile_begin

    def arguments(self, weight: Tensor, out: Tensor) -> tuple[int, ...]:
        """The first nine arguments of moe_quantize and moe_refit."""
        rows, columns = weight.shape
        which = (_PACKING_IDS[self.packing.name], _DTYPES[weight.dtype], weight.data_ptr(), rows, columns)
        return (*which, self.tile_begin, self.tile_end, out.data_ptr(), self.stride_bytes)


def check_place(
    weight: Tensor, packing: str, out: Tensor, tile_begin: int, tile_end: int | None, stride_tiles: int
) -> TilePlace:
    """The place, or ValueError as `quantize_tiles` says."""
    layout = tile_packing_named(packing)
    _check_weight(weight)
    rows, columns = weight.shape
    tile_bytes = layout.tile_bytes(columns)
    end = tiles_of(rows) if tile_end is None else tile_end
    if not 0 <= tile_begin <= end <= tiles_of(rows):
        raise ValueError(f"tiles {tile_begin}..{end} of a matrix of {tiles_of(rows)} tiles")
    if stride_tiles < 1:
        raise ValueError(f"stride_tiles is {stride_tiles}, must be 1 or more")
    count = end - tile_begin
    needed = ((count - 1) * stride_tiles + 1) * tile_bytes if count else 0
    if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, must be contiguous uint8 [n] on the CPU"
        )
    if out.numel() < needed:
        raise ValueError(f"out has {out.numel()} bytes, {count} tiles of {layout.name} take {needed}")
    return TilePlace(layout, tile_begin, end, stride_tiles * tile_bytes)


def refit_tiles(
    weight: Tensor,
    out: Tensor,
    place: TilePlace,
    errors: Tensor,
    *,
    importance: Tensor | None = None,
    factor: Tensor | None = None,
    factor_block: int = 0,
    order: Tensor | None = None,
    diagonal: Tensor | None = None,
    pairing: Tensor | None = None,
    low_rank: Tensor | None = None,
    damping: Tensor | None = None,
    static: bool = False,
    isa: str = "auto",
) -> None:
    """moe_refit of converter/native/solver_api.h; converter/feedback_native.py says what the tensors are."""
    columns = weight.shape[1]
    for name, numbers in (("importance", importance), ("diagonal", diagonal), ("pairing", pairing)):
        if numbers is not None and (
            numbers.dtype != torch.float32 or numbers.shape != (columns,) or not numbers.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {numbers.dtype} {tuple(numbers.shape)}, must be contiguous float32 [{columns}]"
            )

    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    non_finite = ctypes.c_int64(0)
    status = _library().moe_refit(
        *place.arguments(weight, out),
        address(factor),
        factor_block,
        address(order),
        address(importance),
        address(diagonal),
        address(pairing),
        address(low_rank),
        0 if low_rank is None else low_rank.shape[1],
        address(damping),
        _STATIC if static else 0,
        ISAS[isa],
        errors.data_ptr(),
        ctypes.byref(non_finite),
    )
    _raise_for(status, non_finite.value, isa)


def quantize_matrix(
    weight: Tensor,
    packing: str,
    out: Tensor,
    *,
    stride_tiles: int = 1,
    refit: bool = False,
    importance: Tensor | None = None,
    isa: str = "auto",
) -> QuantizeError:
    """Quantizes a whole matrix into `out` on this thread; arguments and errors as in `quantize_tiles`."""
    return QuantizeError.total(
        [quantize_tiles(weight, packing, out, stride_tiles=stride_tiles, refit=refit, importance=importance, isa=isa)]
    )


def hqq(weight: Tensor, nbits: int, group_size: int, *, round_zero: bool = False, isa: str = "auto") -> HqqGroups:
    """HQQ alone, with float32 scale and zero: what the hqq package gives for axis=1.

    weight: as in `quantize_tiles`; groups run along the columns, the last one may be short.
    nbits: 2, 3 or 4; group_size: 16, 32 or 64. round_zero: start from a rounded zero, as hqq's BaseQuantizeConfig
    does for 4 bits, at 1-2 % more error. Values that are not finite give undefined codes.
    """
    _check_weight(weight)
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
    status = _library().moe_hqq(
        nbits,
        group_size,
        _DTYPES[weight.dtype],
        weight.data_ptr(),
        rows,
        columns,
        _ROUND_ZERO if round_zero else 0,
        ISAS[isa],
        scale.data_ptr(),
        zero.data_ptr(),
        codes.data_ptr(),
    )
    _raise_for(status, 0, isa)
    return HqqGroups(codes, scale, zero)


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in _DTYPES or weight.dim() != 2 or weight.device.type != "cpu":
        found = f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight is {found}, must be float32, bfloat16 or float16 [rows, columns] on the CPU")
    if not weight.is_contiguous() or weight.numel() == 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be contiguous and not empty")


def _raise_for(status: int, non_finite: int, isa: str) -> None:
    if status == _OK:
        return
    if status == _NON_FINITE:
        raise NonFiniteWeightsError(non_finite)
    if status == _OVERFLOW:
        raise ScaleOverflowError
    if status == _NO_MEMORY:
        raise NativeSolverError("the native solver found no memory for its scratch", "use fewer workers")
    if status == _NO_ISA:
        raise NativeSolverError(f"this processor or this build has no {isa} path", 'use isa="auto"')
    raise ValueError("the native solver refused its arguments")


def _library() -> ctypes.CDLL:
    library = _load()
    if not isinstance(library, ctypes.CDLL):
        raise NativeSolverError(library, "pip install --force-reinstall --no-binary moe-convert moe-convert")
    return library


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    paths = library_paths("converter", LIBRARY)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        places = " nor in ".join(str(path.parent) for path in paths)
        return f"no native solver ({LIBRARY} is not in {places}): install a C++20 compiler and reinstall moe-convert"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.moe_solver_abi()
    except (OSError, AttributeError) as error:
        return f"no native solver: {path} cannot be loaded: {error}"
    if abi != ABI:
        return f"no native solver: {path} has ABI {abi}, this release needs {ABI}"
    pointer, i32, i64, u32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
    common: list[Any] = [i32, i32, pointer, i64, i64, i64, i64, pointer, i64]
    library.moe_quantize.argtypes = [*common, u32, i32, pointer, pointer]
    metric: list[Any] = [pointer, i64, pointer, pointer, pointer, pointer, pointer, i64, pointer]
    library.moe_refit.argtypes = [*common, *metric, u32, i32, pointer, pointer]
    library.moe_hqq.argtypes = [i32, i32, i32, pointer, i64, i64, u32, i32, pointer, pointer, pointer]
    return library
