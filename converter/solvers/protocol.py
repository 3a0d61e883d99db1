"""What a solver is: it turns weights into packed tiles and says how far these are off."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from converter.calibration.input_statistics import InputStatistics
from formats.errors import SourceError
from formats.packing import Packing

DAMAGED_HINT = (
    "the checkpoint is damaged or its training diverged; get it again or choose another one"
)


class UnfitWeightsError(SourceError, ValueError):
    """Weights that the packing cannot hold. The caller knows file, tensor and place, and adds them."""

    default_hint = DAMAGED_HINT


class NonFiniteWeightsError(UnfitWeightsError):
    """Infinities or NaN among the weights; `count` of them."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} weights are infinite or NaN")
        self.count = count


@dataclass(frozen=True)
class SquaredError:
    """Sums over weights: of (quantized − weight)² and of weight²."""

    error: float = 0.0
    total: float = 0.0

    def __add__(self, other: "SquaredError") -> "SquaredError":
        return SquaredError(self.error + other.error, self.total + other.total)

    @property
    def relative(self) -> float:
        """‖quantized − weight‖ / ‖weight‖, to six digits so that it is the same everywhere; 0 for
        zero weights.
        """
        return float(f"{(self.error / self.total) ** 0.5:.6g}") if self.total else 0.0


class Solver(Protocol):
    """Quantizes blocks of rows; from several threads at once."""

    version: str
    """What the bytes depend on: part of the fingerprint of a conversion, and recorded in the index.
    """

    bytes_a_weight: int
    """Memory that it needs for each weight of a block, the block included."""

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """Fills `tiles` (uint8 [tiles, tile_bytes], a view whose rows may lie apart) with `weight`
        [rows, columns].

        weight: bfloat16, float16 or float32, contiguous. Raises UnfitWeightsError where a weight is
        not finite or a scale does not fit into fp16.
        """


@runtime_checkable
class CalibratedSolver(Solver, Protocol):
    """A solver that also minimizes the error of a linear's outputs, given the statistics of its
    inputs.
    """

    def solve_calibrated(
        self, weight: Tensor, packing: Packing, tiles: Tensor, statistics: InputStatistics
    ) -> SquaredError:
        """As `solve`, under `statistics` of the inputs of the whole matrix, of which `weight` is
        some rows.

        Raises SingularStatisticsError (converter/solvers/feedback_reference.py) where these cannot
        be used; `solve` then can.
        """
