"""Errors of a solver; the caller adds file, tensor and position."""

from formats.errors import SourceError

DAMAGED_HINT = (
    "the checkpoint is damaged or its training diverged; get it again or choose another one"
)


class UnfitWeightsError(SourceError, ValueError):
    """Weights that the packing cannot hold."""

    default_hint = DAMAGED_HINT


class NonFiniteWeightsError(UnfitWeightsError):
    """Infinite or NaN weights. count: their number."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} weights are infinite or NaN")
        self.count = count


class SingularStatisticsError(SourceError, ValueError):
    """Input statistics without a factorization: not finite, zero, or not positive definite.

    block: number of the first such block of columns, None if unknown.
    """

    def __init__(self, block: int | None = None) -> None:
        where = "" if block is None else f" in column block {block}"
        super().__init__(
            f"the input statistics are singular{where}", "calibrate with more or other text"
        )
        self.block = block
