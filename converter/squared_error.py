"""The error of quantized weights, which solvers return and the journal records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SquaredError:
    """Two float64 sums over weights: (quantized - weight)² and weight²."""

    error: float = 0.0
    total: float = 0.0

    def __add__(self, other: "SquaredError") -> "SquaredError":
        return SquaredError(self.error + other.error, self.total + other.total)

    @property
    def relative(self) -> float:
        """norm(quantized - weight) / norm(weight); 0 for zero weights.

        Rounded to six digits, so that every machine gives the same number.
        """
        if not self.total:
            return 0.0
        return float(f"{(self.error / self.total) ** 0.5:.6g}")
