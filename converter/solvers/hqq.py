"""The solver `hqq`: half-quadratic quantization of each group, without calibration."""

from torch import Tensor

from converter.solvers.hqq_package import PackageHqq
from converter.solvers.interface import Solver
from converter.solvers.native import hqq_native, solver_library
from converter.solvers.native.tile_place import flat_tiles
from converter.squared_error import SquaredError
from formats.files.log_once import warn_once
from formats.packing import Packing


class NativeHqq:
    """`hqq` by the native library: hundreds of millions of weights per second and core.

    Every ISA gives the same bytes.
    """

    version = f"native {solver_library.RESULT_VERSION}"
    bytes_a_weight = 4

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """Implement `Solver.solve`."""
        flat, stride_tiles = flat_tiles(tiles)
        return hqq_native.quantize_matrix(weight, packing.name, flat, stride_tiles=stride_tiles)


def make_hqq() -> Solver:
    """Return the native solver, or the package's with a warning if there is no native library."""
    if solver_library.available():
        return NativeHqq()
    warn_once(f"{solver_library.describe()}; the hqq package does the same a hundred times slower")
    return PackageHqq()
