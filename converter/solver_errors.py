"""Errors that a solver raises. The caller adds file, tensor and position."""

from formats.errors import SourceError

DAMAGED_HINT = (
    "the checkpoint is damaged or its training diverged; get it again or choose another one"
)


class UnfitWeightsError(SourceError, ValueError):
    """The packing cannot hold these weights. The message names no file: the caller adds it."""

    default_hint = DAMAGED_HINT


class NonFiniteWeightsError(UnfitWeightsError):
    """`count` weights are infinite or NaN."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} weights are infinite or NaN")
        self.count = count


class SingularStatisticsError(SourceError, ValueError):
    """The input statistics have no factorization: not finite, zero, or not positive definite.

    block: number of the first such block of columns, None if unknown.
    """

    def __init__(self, block: int | None = None) -> None:
        where = "" if block is None else f" in column block {block}"
        super().__init__(
            f"the input statistics are singular{where}", "calibrate with more or other text"
        )
        self.block = block
