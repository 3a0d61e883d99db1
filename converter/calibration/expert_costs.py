"""Error that each packing adds to an expert's outputs, estimated from a sample of its rows."""

import torch
from torch import Tensor

from converter.calibration.layer_statistics import DOWN_BLOCK, PRIOR_SHARE
from converter.calibration.moments import block_moments, effective_tokens
from converter.forward.expert_forward import DownVisitor, SliceVisitor, inner_activations
from converter.input_statistics import InputStatistics
from converter.solver_errors import SingularStatisticsError
from converter.solvers.interface import CalibratedSolver
from formats.packing import TILE_ROWS, tile_packing_named
from formats.tiles import matrix_weights

_SAMPLED_ROWS = 1024

Energies = dict[tuple[str, str], Tensor]
"""(projection, packing) -> squared norm of the output's error, float32 [tokens]."""


class RowQuantizer:
    """Quantizes rows to each of `packings`, projection -> names.

    products: dtype in which weights are multiplied.
    """

    def __init__(
        self, solver: CalibratedSolver, packings: dict[str, list[str]], products: torch.dtype
    ) -> None:
        self._solver = solver
        self.packings = packings
        self.products = products

    def zeros(self, tokens: int) -> Energies:
        """Return zero energies for each projection and packing."""
        return {
            (p, name): torch.zeros(tokens) for p, names in self.packings.items() for name in names
        }

    def quantized(self, rows: Tensor, name: str, statistics: InputStatistics) -> Tensor:
        """Return rows [n, columns] after quantization to the packing `name`, float32."""
        if not len(rows):
            return rows.float()
        packing = tile_packing_named(name)
        tiles = torch.empty(packing.stored_shape(*rows.shape), dtype=torch.uint8)
        try:
            self._solver.solve_calibrated(rows.contiguous(), packing, tiles, statistics)
        except SingularStatisticsError:
            self._solver.solve(rows.contiguous(), packing, tiles)
        return matrix_weights(packing, tiles, *rows.shape)


class ExpertCosts(SliceVisitor):
    """Sums the error energies of one expert, for inputs x, float32 [n, hidden].

    weights: of the n tokens, float32 [n]. intermediate: rows of gate and up.
    """

    def __init__(
        self, quantizer: RowQuantizer, x: Tensor, weights: Tensor, intermediate: int
    ) -> None:
        self.energies = quantizer.zeros(len(x))
        self._quantizer = quantizer
        self._statistics = _statistics(x, weights)
        self._x = x.to(quantizer.products)
        self._weights = weights
        self._sampled = _sample(intermediate)
        self._inner_errors: dict[str, list[Tensor]] = {
            name: [] for name in quantizer.packings["gate_up"]
        }

    def gate_up(self, begin: int, gate: Tensor, up: Tensor, inner: Tensor) -> None:
        """Implement `SliceVisitor.gate_up`: keep each packing's error of the sampled `inner`."""
        sampled = self._sampled[begin : begin + len(gate)]
        products = self._quantizer.products
        for name, parts in self._inner_errors.items():
            quantized = (
                self._quantizer.quantized(rows[sampled], name, self._statistics)
                for rows in (gate, up)
            )
            result = inner_activations(self._x, *(rows.to(products) for rows in quantized))
            parts.append(result - inner[:, sampled])

    def start_down(self, inner: Tensor) -> DownVisitor:
        """Implement `SliceVisitor.start_down`."""
        quantizer = self._quantizer
        products = quantizer.products
        inner_errors = {
            name: torch.cat(parts, 1).to(products) for name, parts in self._inner_errors.items()
        }
        statistics = _statistics(inner.float(), self._weights)
        columns_share = float(self._sampled.double().mean())
        sampled_rows = _sample(self._x.shape[1])
        rows_share = float(sampled_rows.double().mean())

        def take(begin: int, rows: Tensor) -> None:
            columns = rows.to(products)[:, self._sampled].T.contiguous()
            for name, inner_error in inner_errors.items():
                energy = (inner_error @ columns).float().square().sum(1)
                self.energies["gate_up", name] += energy / columns_share
            sample = rows[sampled_rows[begin : begin + len(rows)]]
            for name in quantizer.packings["down"]:
                quantized = quantizer.quantized(sample, name, statistics)
                error = (quantized - sample.float()).to(products)
                energy = (inner @ error.T).float().square().sum(1)
                self.energies["down", name] += energy / rows_share

        return take


def _statistics(x: Tensor, weights: Tensor) -> InputStatistics:
    """Return statistics in blocks of columns, shrunk towards their diagonal.

    Without shrinking they could be singular: a block may have more columns than there are tokens.
    """
    moment = block_moments(x, weights, DOWN_BLOCK) / weights.double().sum().clamp_min(1e-30).float()
    diagonal = InputStatistics(torch.diag_embed(moment.diagonal(dim1=1, dim2=2)), 1.0)
    return InputStatistics(moment, effective_tokens(weights)).shrunk(
        diagonal, PRIOR_SHARE * DOWN_BLOCK
    )


def _sample(rows: int) -> Tensor:
    """Return True for sampled rows, bool [rows]: whole tiles, evenly spread."""
    return torch.arange(rows) // TILE_ROWS % max(1, rows // _SAMPLED_ROWS) == 0
