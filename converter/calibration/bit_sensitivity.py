"""What fewer bits cost each layer: how far the experts' outputs are off, beside what they are added
to.

Calibration's tokens, or some of them, go through the original model once. For each projection and
packing a sample of its rows is quantized, under statistics in blocks, which take little time, and
the layer's output error is estimated: mean over tokens of ‖error‖² / ‖residual stream after the
layer‖², errors of different rows and experts taken as independent. docs/quality.md has how well
that tells which layers need bits.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.calibration.calibration_pass import STATE_FOLDER
from converter.calibration.calibration_text import CalibrationTokens
from converter.calibration.layer_statistics import DOWN_BLOCK, PRIOR_SHARE
from converter.calibration.moments import block_moments, effective_tokens
from converter.calibration.state_file import read_state, write_state
from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import (
    DownVisitor,
    ExpertForward,
    SliceVisitor,
    fast_products,
    inner_activations,
)
from converter.forward.layer_forward import LayerForward
from converter.forward.layer_loop import LayerLoop, LayerWork, Piece, Steps
from converter.forward.ordered_tasks import RunAll
from converter.input_statistics import InputStatistics
from converter.solver_errors import SingularStatisticsError
from converter.solvers.interface import CalibratedSolver
from formats.errors import SourceError
from formats.packing import TILE_ROWS, tile_packing_named

VERSION = 2
"""Of everything here that the choice of bits depends on."""

TOKENS = 2048
"""Of calibration's at most."""

_SAMPLED_ROWS = 1024
_WINDOWS_AT_ONCE = 4
_STATE = "sensitivity.safetensors"

LayerErrors = dict[str, dict[str, float]]
"""projection -> packing -> error"""
Energies = dict[tuple[str, str], Tensor]
"""(projection, packing) -> float32 [tokens], the squared norm of the output's error."""

_log = logging.getLogger(__name__)


class BitSensitivity:
    """Measures one layer after the other; an interrupted one goes on after the last layer whose
    state is in `folder`.

    packings: for each projection (gate_up, down). identity: what the state must have been computed
    from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        solver: CalibratedSolver,
        packings: dict[str, list[str]],
        tokens: CalibrationTokens,
        folder: Path,
        identity: Any,
        run_all: RunAll,
    ) -> None:
        self._checkpoint = checkpoint
        self._forward = LayerForward(checkpoint, fast_products(checkpoint))
        self._quantizer = _RowQuantizer(solver, packings, self._forward.products)
        count = max(1, min(len(tokens.windows), TOKENS // tokens.windows.shape[1]))
        spread = [i * (len(tokens.windows) - 1) // max(1, count - 1) for i in range(count)]
        self._windows = tokens.windows[spread]
        self._weights = tokens.weights[spread].repeat_interleave(self._windows.shape[1])
        # An expert's statistics are of all its tokens: they are one piece.
        most_experts = max(module.experts for module in checkpoint.shape.experts)
        steps = Steps(_WINDOWS_AT_ONCE, self._windows.numel(), most_experts)
        self._loop = LayerLoop(checkpoint, self._forward, steps, run_all)
        self._file = folder / STATE_FOLDER / _STATE
        parts = [identity, VERSION, packings, tokens.sha256, solver.version]
        self._identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def measure(self, progress: Callable[[int], None]) -> list[LayerErrors]:
        """Of each layer with experts: projection -> packing -> error. `progress` is told how many
        of them are done.

        SourceError naming the layer where activations are infinite or NaN.
        """
        found, stream = self._restore()
        layers = [module.decoder_layer for module in self._checkpoint.shape.experts]
        position = layers[len(found) - 1] + 1 if found else 0
        for layer in layers[len(found) :]:
            progress(len(found))
            for dense in range(position, layer):
                self._loop.pass_layer(dense, stream, LayerWork(self._forward.experts))
            _log.info("measuring what bits are worth: layer %d", layer)
            found.append(self._layer(layer, stream))
            write_state(self._file, self._identity, found, stream)
            position = layer + 1
        return found

    def _restore(self) -> tuple[list[LayerErrors], Tensor]:
        """What was measured before, and the activations after it."""
        shape = (*self._windows.shape, self._forward.hidden_size)
        if kept := read_state(self._file, self._identity, shape):
            return kept
        stream = torch.empty(shape)
        self._forward.embed(self._windows, stream, _WINDOWS_AT_ONCE)
        return [], stream

    def _layer(self, layer: int, stream: Tensor) -> LayerErrors:
        """Take the stream through decoder layer `layer`, in place, and return what each packing
        costs there.
        """
        (intermediate,) = (
            m.intermediate for m in self._checkpoint.shape.experts if m.decoder_layer == layer
        )
        work = _Measurement(self._forward.experts, self._quantizer, intermediate, self._weights)
        self._loop.pass_layer(layer, stream, work)
        errors = work.errors(stream.flatten(0, 1))
        if not all(
            math.isfinite(error) for by_packing in errors.values() for error in by_packing.values()
        ):
            raise SourceError(
                f"{self._checkpoint.folder}: layer {layer}: errors of quantized experts are infinite or NaN",
                "the checkpoint is damaged or its training diverged; convert without a target of bits",
            )
        return errors


class _Measurement(LayerWork):
    """Sums up what each packing adds to the outputs of a layer's experts, by token."""

    def __init__(
        self, experts: ExpertForward, quantizer: "_RowQuantizer", intermediate: int, weights: Tensor
    ) -> None:
        super().__init__(experts)
        self._quantizer = quantizer
        self._intermediate = intermediate
        self._weights = weights
        self._energies = quantizer.zeros(len(weights))

    def expert(self, piece: Piece, x: Tensor) -> tuple[Tensor, Energies]:
        """As LayerWork: with the energies of the packings' errors."""
        costs = _ExpertCosts(self._quantizer, x, self._weights[piece.tokens], self._intermediate)
        return self._experts.output(piece.layer, piece.expert, x, costs), costs.energies

    def take_expert(self, piece: Piece, found: Energies) -> None:
        """As LayerWork."""
        for key, energy in found.items():
            self._energies[key].index_add_(0, piece.tokens, energy * piece.scores.square())

    def errors(self, after: Tensor) -> LayerErrors:
        """Return the mean over tokens of each packing's energy, beside the stream after the layer,
        [tokens, hidden].
        """
        weighted = (self._weights / after.square().sum(1).clamp_min(1e-30)).double()
        total = self._weights.double().sum()
        errors: LayerErrors = {}
        for (projection, name), energy in self._energies.items():
            errors.setdefault(projection, {})[name] = float((weighted * energy).sum() / total)
        return errors


class _RowQuantizer:
    """Quantizes rows by each packing. products: the dtype in which weights are multiplied."""

    def __init__(
        self, solver: CalibratedSolver, packings: dict[str, list[str]], products: torch.dtype
    ) -> None:
        self._solver = solver
        self.packings = packings
        self.products = products

    def zeros(self, tokens: int) -> Energies:
        """Return no energy, for each packing."""
        return {
            (p, name): torch.zeros(tokens) for p, names in self.packings.items() for name in names
        }

    def quantized(self, rows: Tensor, name: str, statistics: InputStatistics) -> Tensor:
        """Return some rows as the packing `name` has them, float32."""
        if not len(rows):
            return rows.float()
        packing = tile_packing_named(name)
        tiles = torch.empty(packing.stored_shape(*rows.shape), dtype=torch.uint8)
        try:
            self._solver.solve_calibrated(rows.contiguous(), packing, tiles, statistics)
        except SingularStatisticsError:
            self._solver.solve(rows.contiguous(), packing, tiles)
        return packing.weights(tiles, *rows.shape)


class _ExpertCosts(SliceVisitor):
    """Sums what each packing changes in an expert's outputs for inputs x, float32 [n, hidden], of
    tokens with these weights, by a sample of its rows.
    """

    def __init__(
        self, quantizer: _RowQuantizer, x: Tensor, weights: Tensor, intermediate: int
    ) -> None:
        self.energies = quantizer.zeros(len(x))
        self._quantizer = quantizer
        self._statistics = _statistics(x, weights)
        self._x = x.to(quantizer.products)
        self._weights = weights
        self._sampled = _sample(intermediate)
        self._lost: dict[str, list[Tensor]] = {name: [] for name in quantizer.packings["gate_up"]}

    def gate_up(self, begin: int, gate: Tensor, up: Tensor, inner: Tensor) -> None:
        """As SliceVisitor: keeps how far each packing is from `inner`."""
        here = self._sampled[begin : begin + len(gate)]
        for name, parts in self._lost.items():
            both = (
                self._quantizer.quantized(rows[here], name, self._statistics) for rows in (gate, up)
            )
            found = inner_activations(
                self._x, *(rows.to(self._quantizer.products) for rows in both)
            )
            parts.append(found - inner[:, here])

    def start_down(self, inner: Tensor) -> DownVisitor:
        """As SliceVisitor."""
        quantizer, products = self._quantizer, self._quantizer.products
        missing = {name: torch.cat(parts, 1).to(products) for name, parts in self._lost.items()}
        statistics = _statistics(inner.float(), self._weights)
        columns_share = float(self._sampled.double().mean())

        def take(begin: int, rows: Tensor) -> None:
            columns = rows.to(products)[:, self._sampled].T.contiguous()
            for name, part in missing.items():
                self.energies["gate_up", name] += (part @ columns).float().square().sum(
                    1
                ) / columns_share
            sampled = _sample(self._x.shape[1])
            own = rows[sampled[begin : begin + len(rows)]]
            for name in quantizer.packings["down"]:
                error = (quantizer.quantized(own, name, statistics) - own.float()).to(products)
                energy = (inner @ error.T).float().square().sum(1)
                self.energies["down", name] += energy / float(sampled.double().mean())

        return take


def _statistics(x: Tensor, weights: Tensor) -> InputStatistics:
    """In blocks of columns, shrunk towards their diagonal, as the tokens may be fewer than the
    columns of a block.
    """
    moment = block_moments(x, weights, DOWN_BLOCK) / weights.double().sum().clamp_min(1e-30).float()
    diagonal = InputStatistics(torch.diag_embed(moment.diagonal(dim1=1, dim2=2)), 1.0)
    return InputStatistics(moment, effective_tokens(weights)).shrunk(
        diagonal, PRIOR_SHARE * DOWN_BLOCK
    )


def _sample(rows: int) -> Tensor:
    """Which of so many rows are quantized: bool [rows], whole tiles, evenly spread."""
    return torch.arange(rows) // TILE_ROWS % max(1, rows // _SAMPLED_ROWS) == 0
