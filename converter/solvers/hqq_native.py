"""The native solver: HQQ, rounding to S and M, and packing in one call to libmoe_solver.so
(converter/native/).
"""

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solvers.protocol import SquaredError
from converter.solvers.refit_native import refit_tiles
from converter.solvers.solver_library import RESULT_VERSION, library, raise_for
from converter.solvers.tile_place import check_place, check_weight, weights_structure
from formats.native.abi import ISAS
from formats.packing import Packing

_ROUND_ZERO = 1


@dataclass(frozen=True)
class QuantizeError:
    """Sums over a matrix, in fp64: of (weight - dequantized)² and of weight²."""

    sum_squared_error: float
    sum_squares: float

    @classmethod
    def total(cls, tile_errors: Sequence[Tensor]) -> "QuantizeError":
        """The sum over tiles (fp64 [tiles, 2] each), in order: the same number however tiles were
        dealt to threads.
        """
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
    """Quantizes by the native library, hundreds of Mweights a second and core; the same bytes on
    every ISA.
    """

    version = f"native {RESULT_VERSION}"
    bytes_a_weight = 4

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """As `Solver.solve`."""
        stride_tiles = tiles.stride(0) // tiles.shape[1]
        flat = tiles.as_strided(((len(tiles) - 1) * tiles.stride(0) + tiles.shape[1],), (1,))
        error = quantize_matrix(weight, packing.name, flat, stride_tiles=stride_tiles)
        return SquaredError(error.sum_squared_error, error.sum_squares)


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
    """Quantizes tiles `tile_begin`..`tile_end`-1 of a matrix into `out`; several threads may share
    a matrix.

    weight: [rows, columns] float32, bfloat16 or float16 on the CPU, contiguous: always the whole
    matrix.
    out: uint8 [n], contiguous; tile `tile_begin` goes to its front and each next one `stride_tiles`
    tiles later (2 interleaves gate and up). What lies between is not touched.
    refit: scales by a search over ranges and least squares, S, M and super-scales by the error they
    cause, and each row's gain restored; without it the bytes are those of plain HQQ with nearest
    rounding (solver_package.py).
    importance: with refit, float32 [columns] of positive weights of the columns' squared errors, in
    any unit.
    isa: a key of ISAS; all give the same bytes.
    Returns fp64 [tiles, 2], a tile's sum of squared errors and of squares: see
    `QuantizeError.total`. Raises NonFiniteWeightsError, ScaleOverflowError (both ValueErrors),
    NativeSolverError, and ValueError for tensors of a wrong dtype, shape or layout.
    """
    place = check_place(weight, packing, out, tile_begin, tile_end, stride_tiles)
    errors = torch.zeros(place.count, 4 if refit else 2, dtype=torch.float64)
    if not place.count:
        return errors[:, :2]
    if refit:
        refit_tiles(place, errors, importance=importance, isa=isa)
        return errors[:, :2]
    if importance is not None:
        raise ValueError("importance needs refit=True: HQQ has none")
    tiles = place.tiles(errors)
    status = library().moe_quantize(byref(weights_structure(weight)), byref(tiles), 0, ISAS[isa])
    raise_for(status, isa, tiles.non_finite)
    return errors


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
    """Quantizes a whole matrix into `out` on this thread; arguments and errors as in
    `quantize_tiles`.
    """
    return QuantizeError.total(
        [
            quantize_tiles(
                weight,
                packing,
                out,
                stride_tiles=stride_tiles,
                refit=refit,
                importance=importance,
                isa=isa,
            )
        ]
    )


def hqq(
    weight: Tensor, nbits: int, group_size: int, *, round_zero: bool = False, isa: str = "auto"
) -> HqqGroups:
    """HQQ alone, with float32 scale and zero: what the hqq package gives for axis=1.

    weight: as in `quantize_tiles`; groups run along the columns, the last one may be short.
    nbits: 2, 3 or 4; group_size: 16, 32 or 64. round_zero: start from a rounded zero, as hqq's
    BaseQuantizeConfig does for 4 bits, at 1-2 % more error. Values that are not finite give
    undefined codes.
    """
    check_weight(weight)
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
    flags, addresses = (
        _ROUND_ZERO if round_zero else 0,
        (scale.data_ptr(), zero.data_ptr(), codes.data_ptr()),
    )
    status = library().moe_hqq(
        byref(weights_structure(weight)), nbits, group_size, flags, ISAS[isa], *addresses
    )
    raise_for(status, isa)
    return HqqGroups(codes, scale, zero)
