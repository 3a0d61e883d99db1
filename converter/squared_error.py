"""The error of quantized weights: one pair of sums that solvers return and the journal records."""

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
        """norm(quantized - weight) / norm(weight), rounded to six digits; 0 for zero weights.

        The rounding gives the same number on every machine.
        """
        return float(f"{(self.error / self.total) ** 0.5:.6g}") if self.total else 0.0
