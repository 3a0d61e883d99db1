"""Weights that stay as they are in the source: copied into plain rows, and the solver of recipes
with nothing else.
"""

import torch
from torch import Tensor

from converter.solver_errors import NonFiniteWeightsError, UnfitWeightsError
from converter.squared_error import SquaredError
from formats.errors import RecipeError
from formats.packing import Packing
from formats.plain_packing import PlainPacking


class NoSolver:
    """Solves nothing."""

    version = "none"
    bytes_a_weight = 16
    """What copying takes: the rows as they were read and as they are stored, in float32 for the
    sums.
    """

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """RecipeError: a recipe that quantizes names a solver."""
        raise RecipeError(f"{packing.name}: the recipe has no solver", "choose one: --solver")


def plain_packing_for(dtypes: set[str]) -> str:
    """The packing of experts left as they are that are stored in `dtypes`, as safetensors calls
    them: exact for BF16 and for F16 alone; F32, and F16 among others, are rounded to bf16.
    """
    return "rows-f16" if dtypes == {"F16"} else "rows-bf16"


def store_rows(weight: Tensor, packing: PlainPacking, out: Tensor) -> SquaredError:
    """Writes `weight` [rows, columns] to `out`, of the packing's dtype: as it is, or rounded to
    nearest even.

    Raises UnfitWeightsError where a weight is not finite, or beyond the packing's largest number.
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
