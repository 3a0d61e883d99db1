"""The solver `feedback`: `refit` with error feedback; it needs calibration."""

import torch
from torch import Tensor

from converter.input_statistics import InputStatistics
from converter.solver_errors import SingularStatisticsError
from converter.solvers.feedback_order import (
    columns_in_order,
    group_order,
    hessian_in_order,
    matrix_in_place,
)
from converter.solvers.feedback_reference import feedback_rows, inverse_factor
from converter.solvers.interface import Solver
from converter.solvers.native import feedback_native, solver_library
from converter.solvers.native.tile_place import flat_tiles
from converter.solvers.refit import NativeRefit, ReferenceRefit, warn_slow_reference
from converter.squared_error import SquaredError
from formats.packing import Packing
from formats.tiles import pack


class ReferenceFeedback(ReferenceRefit):
    """`feedback` in torch."""

    version = "feedback reference 2"

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """Implement `CalibratedSolver.solve_calibrated`."""
        size = packing.group_size
        order, hessian = _in_order(statistics, weight.shape[1], size)
        factor = statistics.derived(("factor", size), lambda: inverse_factor(hessian))
        ordered = weight if order is None else weight[:, columns_in_order(order, size)]
        matrix, error = feedback_rows(ordered, packing, hessian, factor)
        if order is not None:
            matrix = matrix_in_place(matrix, order, size)
        tiles.copy_(pack(matrix, packing))
        return error


class NativeFeedback(NativeRefit):
    """`feedback` by the native library."""

    version = f"feedback native {solver_library.RESULT_VERSION}"

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """Implement `CalibratedSolver.solve_calibrated`."""
        size = packing.group_size
        order, hessian = _in_order(statistics, weight.shape[1], size)
        factor = statistics.derived(("factor", size), lambda: _factor(hessian))
        metric = None
        if len(hessian) == 1 and hessian.shape[1] > feedback_native.EXACT_GAIN_COLUMNS:
            metric = statistics.derived(
                ("metric", size), lambda: feedback_native.gain_metric(factor[0])
            )
        flat, stride_tiles = flat_tiles(tiles)
        errors = feedback_native.quantize_feedback(
            weight,
            packing.name,
            flat,
            factor,
            hessian,
            order=order,
            metric=metric,
            stride_tiles=stride_tiles,
        )
        return errors.weights


def make_feedback() -> Solver:
    """Return the native solver, or the reference with a warning if there is no native library."""
    if solver_library.available():
        return NativeFeedback()
    warn_slow_reference()
    return ReferenceFeedback()


def _in_order(
    statistics: InputStatistics, columns: int, group_size: int
) -> tuple[Tensor | None, Tensor]:
    """Return the order of the groups and the Hessian of the columns in that order."""

    def make() -> tuple[Tensor | None, Tensor]:
        order = group_order(statistics.hessian, columns, group_size)
        return order, hessian_in_order(statistics.hessian, order, group_size)

    return statistics.derived(("order", group_size), make)


def _factor(hessian: Tensor) -> Tensor:
    # hessian_factor gives a zero Hessian the identity; the caller must fall back to `solve`.
    if not bool(torch.count_nonzero(hessian)):
        raise SingularStatisticsError
    return feedback_native.hessian_factor(hessian)
