"""HQQ and refit by the native library: it solves, rounds to S and M and packs in one call."""

from collections.abc import Sequence
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from converter.solvers.native.refit_native import refit_tiles
from converter.solvers.native.solver_library import library, raise_for
from converter.solvers.native.tile_place import check_place, weights_structure
from converter.squared_error import SquaredError
from formats.native.abi import ISAS


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
    """Quantize tiles `tile_begin`..`tile_end` (exclusive) of a matrix into `out`.

    Several threads may share a matrix. Returns float64 [tiles, 2]: each tile's sum of squared
    errors and of squared weights; `summed_over_tiles` adds them up.

    weight: the whole matrix [rows, columns], float32, bfloat16 or float16, contiguous, on the CPU.
    out: uint8 [n], contiguous. Tile `tile_begin` is at its front and each next tile `stride_tiles`
    tiles later (2 interleaves gate and up); the bytes between stay unchanged.
    refit: range search, least squares and row gain, as in converter/solvers/refit.py. Otherwise HQQ
    with scales rounded to nearest, as in converter/solvers/hqq_package.py.
    importance: only with refit; float32 [columns], positive weights of squared errors, in any unit.
    isa: a key of ISAS; all give the same bytes.

    Raises NonFiniteWeightsError or ScaleOverflowError for weights that do not fit,
    NativeSolverError for a library that cannot run, ValueError for tensors of a wrong dtype, shape
    or layout.
    """
    place = check_place(weight, packing, out, tile_begin, tile_end, stride_tiles)
    errors = torch.zeros(place.count, 4 if refit else 2, dtype=torch.float64)
    if not place.count:
        return errors[:, :2]
    if refit:
        refit_tiles(place, errors, importance=importance, isa=isa)
        return errors[:, :2]
    if importance is not None:
        raise ValueError("importance needs refit=True: HQQ weighs all columns alike")
    tiles = place.tiles(errors)
    status = library().moe_quantize(byref(weights_structure(weight)), byref(tiles), 0, ISAS[isa])
    raise_for(status, isa, tiles.non_finite)
    return errors


def quantize_matrix(weight: Tensor, packing: str, out: Tensor, **options: Any) -> SquaredError:
    """Quantize a whole matrix into `out` in this thread; options and errors as `quantize_tiles`."""
    return summed_over_tiles([quantize_tiles(weight, packing, out, **options)])


def summed_over_tiles(tile_errors: Sequence[Tensor]) -> SquaredError:
    """Return the sum of float64 [tiles, 2] tensors, tile by tile in order.

    The order fixes the last bits, however the tiles are split among threads.
    """
    error = total = 0.0
    for tile_error, tile_total in torch.cat(list(tile_errors)).tolist():
        error += tile_error
        total += tile_total
    return SquaredError(error, total)
