"""The solvers `refit` and `feedback`: by the native library where it is built, else by the
reference in torch.
"""

import torch
from torch import Tensor

from converter.calibration.input_statistics import InputStatistics
from converter.solvers import feedback_native, hqq_native, solver_library
from converter.solvers.feedback_order import (
    columns_in_order,
    group_order,
    hessian_in_order,
    matrix_in_place,
)
from converter.solvers.feedback_reference import (
    SingularStatisticsError,
    factorize,
    feedback_rows,
    refit_rows,
)
from converter.solvers.protocol import SquaredError
from formats.packing import Packing, pack


class ReferenceRefit:
    """`refit` in torch."""

    version = "refit reference 1"
    bytes_a_weight = 64

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """As `Solver.solve`."""
        matrix, error = refit_rows(weight, packing)
        tiles.copy_(pack(matrix, packing))
        return error


class ReferenceFeedback(ReferenceRefit):
    """`feedback` in torch."""

    version = "feedback reference 2"

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """As `CalibratedSolver.solve_calibrated`."""
        order, hessian = _in_order(statistics, weight.shape[1], packing.group_size)
        factor = statistics.derived(("factor", packing.group_size), lambda: factorize(hessian))
        moved = weight if order is None else weight[:, columns_in_order(order, packing.group_size)]
        matrix, error = feedback_rows(moved, packing, hessian, factor)
        if order is not None:
            matrix = matrix_in_place(matrix, order, packing.group_size)
        tiles.copy_(pack(matrix, packing))
        return error


class NativeRefit:
    """`refit` by the native library."""

    version = f"refit native {solver_library.RESULT_VERSION}"
    bytes_a_weight = 4

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """As `Solver.solve`."""
        flat, stride_tiles = _flat(tiles)
        error = hqq_native.quantize_matrix(
            weight, packing.name, flat, stride_tiles=stride_tiles, refit=True
        )
        return SquaredError(error.sum_squared_error, error.sum_squares)


class NativeFeedback(NativeRefit):
    """`feedback` by the native library."""

    version = f"feedback native {solver_library.RESULT_VERSION}"

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """As `CalibratedSolver.solve_calibrated`."""
        size = packing.group_size
        order, hessian = _in_order(statistics, weight.shape[1], size)
        try:
            factor = statistics.derived(("factor", size), lambda: _factor(hessian))
        except feedback_native.SingularHessianError:
            raise SingularStatisticsError from None
        metric = None
        if len(hessian) == 1 and hessian.shape[1] > feedback_native.EXACT_GAIN_COLUMNS:
            metric = statistics.derived(
                ("metric", size), lambda: feedback_native.gain_metric(factor[0])
            )
        flat, stride_tiles = _flat(tiles)
        error = feedback_native.quantize_feedback(
            weight,
            packing.name,
            flat,
            factor,
            hessian,
            order=order,
            metric=metric,
            stride_tiles=stride_tiles,
        )
        return SquaredError(error.sum_squared_error, error.sum_squares)


def _in_order(
    statistics: InputStatistics, columns: int, group_size: int
) -> tuple[Tensor | None, Tensor]:
    """The groups' order, and the Hessian of the columns in it."""

    def make() -> tuple[Tensor | None, Tensor]:
        order = group_order(statistics.hessian, columns, group_size)
        return order, hessian_in_order(statistics.hessian, order, group_size)

    return statistics.derived(("order", group_size), make)


def _factor(hessian: Tensor) -> Tensor:
    if not bool(torch.count_nonzero(hessian)):
        raise SingularStatisticsError
    return feedback_native.factorize(hessian)


def _flat(tiles: Tensor) -> tuple[Tensor, int]:
    """The bytes from the first tile to the last of a strided view, and how many tiles its rows are
    apart.
    """
    size = (len(tiles) - 1) * tiles.stride(0) + tiles.shape[1]
    return tiles.as_strided((size,), (1,)), tiles.stride(0) // tiles.shape[1]
