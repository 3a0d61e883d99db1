"""The solver `refit`: range search and least squares, without calibration."""

from torch import Tensor

from converter.solvers.interface import Solver
from converter.solvers.native import hqq_native, solver_library
from converter.solvers.native.tile_place import flat_tiles
from converter.solvers.refit_reference import refit_rows
from converter.squared_error import SquaredError
from formats.files.log_once import warn_once
from formats.packing import Packing
from formats.tiles import pack


class ReferenceRefit:
    """`refit` in torch."""

    version = "refit reference 1"
    bytes_a_weight = 64

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """Implement `Solver.solve`."""
        matrix, error = refit_rows(weight, packing)
        tiles.copy_(pack(matrix, packing))
        return error


class NativeRefit:
    """`refit` by the native library."""

    version = f"refit native {solver_library.RESULT_VERSION}"
    bytes_a_weight = 4

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """Implement `Solver.solve`."""
        flat, stride_tiles = flat_tiles(tiles)
        return hqq_native.quantize_matrix(
            weight, packing.name, flat, stride_tiles=stride_tiles, refit=True
        )


def make_refit() -> Solver:
    """Return the native solver, or the reference with a warning if there is no native library."""
    if solver_library.available():
        return NativeRefit()
    warn_slow_reference()
    return ReferenceRefit()


def warn_slow_reference() -> None:
    """Warn once that the torch reference replaces the native library."""
    warn_once(f"{solver_library.describe()}; the reference in torch is many times slower")
