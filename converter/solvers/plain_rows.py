"""Plain rows for weights that stay unquantized, and the solver of recipes without quantization."""

import torch
from torch import Tensor

from converter.solver_errors import NonFiniteWeightsError, UnfitWeightsError
from converter.squared_error import SquaredError
from formats.errors import RecipeError
from formats.packing import Packing, PlainPacking


class NoSolver:
    """Solver of recipes that quantize nothing; it refuses every matrix."""

    version = "none"
    bytes_a_weight = 16
    """Memory of copying: the rows as read and as stored, and float32 copies for the error sums."""

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """Raise RecipeError: a recipe that quantizes must name a solver."""
        raise RecipeError(
            f"{packing.name}: the recipe quantizes but names no solver", "choose one: --solver NAME"
        )


def plain_packing_for(dtypes: set[str]) -> str:
    """Return the plain packing for experts with these safetensors dtypes, such as "BF16".

    It is exact if all are BF16 or all are F16. F32, or F16 beside other dtypes, rounds to bf16.
    """
    return "rows-f16" if dtypes == {"F16"} else "rows-bf16"


def store_rows(weight: Tensor, packing: PlainPacking, out: Tensor) -> SquaredError:
    """Write `weight` [rows, columns] to `out` and return the error.

    out: of the packing's dtype; other dtypes are rounded to nearest even. Raises UnfitWeightsError
    if a weight is not finite or exceeds the packing's range.
    """
    out.copy_(weight)
    if not bool(torch.isfinite(out).all()):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise NonFiniteWeightsError(bad)
        raise UnfitWeightsError(
            f"weights up to {float(weight.abs().max()):g} do not fit into {packing.name}",
            "use rows-bf16" if packing.name == "rows-f16" else "",
        )
    error = 0.0 if out.dtype is weight.dtype else _sum_squares(out.float() - weight.float())
    return SquaredError(error, _sum_squares(weight))


def _sum_squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.float(), dtype=torch.float64)) ** 2
