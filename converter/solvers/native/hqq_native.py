"""The native solver: HQQ, rounding to S and M, and packing in one call to libmoe_solver.so
(converter/native/).
"""

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from converter.solvers.native.refit_native import refit_tiles
from converter.solvers.native.solver_library import library, raise_for
from converter.solvers.native.tile_place import check_place, weights_structure
from converter.squared_error import SquaredError
from formats.native.abi import ISAS


def summed_over_tiles(tile_errors: Sequence[Tensor]) -> SquaredError:
    """Return the sum of float64 [tiles, 2] tensors, tile by tile in order.

    The order fixes the last bits, however the tiles were dealt to threads.
    """
    error = squares = 0.0
    for tile_error, tile_squares in torch.cat(list(tile_errors)).tolist():
        error += tile_error
        squares += tile_squares
    return SquaredError(error, squares)


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
    `SquaredError.total`. Raises NonFiniteWeightsError, ScaleOverflowError (both ValueErrors),
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
) -> SquaredError:
    """Quantizes a whole matrix into `out` on this thread; arguments and errors as in
    `quantize_tiles`.
    """
    return summed_over_tiles(
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
