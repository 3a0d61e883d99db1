"""The interface of solvers: weights in, packed tiles and their error out."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from converter.input_statistics import InputStatistics
from converter.squared_error import SquaredError
from formats.packing import Packing


class Solver(Protocol):
    """Quantizes blocks of rows. Several threads may call it at once."""

    version: str
    """Name and version of the code that decides the bytes. The fingerprint of a conversion and the
    index record it.
    """

    bytes_a_weight: int
    """Peak memory for each weight of a block, in bytes, with the block itself."""

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """Quantize `weight` into `tiles` and return the error.

        weight: bfloat16, float16 or float32 [rows, columns], contiguous. tiles: uint8 [tiles,
        tile_bytes], perhaps a strided view. Raises UnfitWeightsError if a weight is not finite or
        a scale exceeds fp16.
        """


@runtime_checkable
class CalibratedSolver(Solver, Protocol):
    """A solver that also minimizes output errors, given statistics of a linear layer's inputs."""

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """Quantize `weight` into `tiles`, with `statistics` of the inputs of the whole matrix.

        weight: some rows of that matrix, as in `solve`. Raises SingularStatisticsError for
        statistics without a factorization; `solve` works without them.
        """
