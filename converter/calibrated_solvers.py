"""The solvers `refit` and `feedback`: by the native library where it is built, else by the reference in torch."""

import torch
from torch import Tensor

from converter import feedback_native, solver_native
from converter.feedback_reference import SingularStatisticsError, factorize, feedback_rows, refit_rows
from converter.solver import SquaredError
from converter.statistics import InputStatistics
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

    version = "feedback reference 1"

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """As `CalibratedSolver.solve_calibrated`."""
        hessian = statistics.hessian
        factor = statistics.derived("factor", lambda: factorize(hessian))
        matrix, error = feedback_rows(weight, packing, hessian, factor)
        tiles.copy_(pack(matrix, packing))
        return error


class NativeRefit:
    """`refit` by the native library."""

    version = f"refit native {solver_native.ABI}"
    bytes_a_weight = 4

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """As `Solver.solve`."""
        flat, stride_tiles = _flat(tiles)
        error = solver_native.quantize_matrix(weight, packing.name, flat, stride_tiles=stride_tiles, refit=True)
        return SquaredError(error.sum_squared_error, error.sum_squares)


class NativeFeedback(NativeRefit):
    """`feedback` by the native library."""

    version = f"feedback native {solver_native.ABI}"

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """As `CalibratedSolver.solve_calibrated`."""
        hessian = statistics.hessian
        try:
            factor = statistics.derived("factor", lambda: _factor(hessian))
        except feedback_native.SingularHessianError:
            raise SingularStatisticsError from None
        metric = None
        if len(hessian) == 1 and hessian.shape[1] > feedback_native.EXACT_GAIN_COLUMNS:
            metric = statistics.derived("metric", lambda: feedback_native.gain_metric(factor[0]))
        flat, stride_tiles = _flat(tiles)
        error = feedback_native.quantize_feedback(
            weight, packing.name, flat, factor, hessian, metric=metric, stride_tiles=stride_tiles
        )
        return SquaredError(error.sum_squared_error, error.sum_squares)


def _factor(hessian: Tensor) -> Tensor:
    if not bool(torch.count_nonzero(hessian)):
        raise SingularStatisticsError
    return feedback_native.factorize(hessian)


def _flat(tiles: Tensor) -> tuple[Tensor, int]:
    """The bytes from the first tile to the last of a strided view, and how many tiles its rows are apart."""
    size = (len(tiles) - 1) * tiles.stride(0) + tiles.shape[1]
    return tiles.as_strided((size,), (1,)), tiles.stride(0) // tiles.shape[1]
