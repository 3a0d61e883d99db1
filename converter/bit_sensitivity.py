"""What fewer bits cost each layer: how far the experts' outputs are off, beside what they are added to.

Calibration's tokens, or some of them, go through the original model once. For each projection and packing a sample of
its rows is quantized, under statistics in blocks, which take little time, and the layer's output error is estimated:
mean over tokens of ‖error‖² / ‖residual stream after the layer‖², errors of different rows and experts taken as
independent. docs/quality.md has how well that tells which layers need bits.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.calibration import STATE_FOLDER
from converter.calibration_text import CalibrationTokens
from converter.feedback_reference import SingularStatisticsError
from converter.layer_forward import ROWS_AT_ONCE, LayerForward, fast_products, inner_activations
from converter.layer_statistics import DOWN_BLOCK, PRIOR_SHARE
from converter.names import ExpertTensor
from converter.solver import CalibratedSolver
from converter.source import Checkpoint
from converter.state_file import read_state, write_state
from converter.statistics import InputStatistics, RunAll, block_moments, effective_tokens
from formats.errors import SourceError
from formats.packing import TILE_ROWS, tile_packing_named

VERSION = 1
"""Of everything here that the choice of bits depends on."""

TOKENS = 2048
"""Of calibration's at most."""

_SAMPLED_ROWS = 1024
_WINDOWS_AT_ONCE = 4
_STATE = "sensitivity.safetensors"

Energies = dict[tuple[str, str], Tensor]
"""(projection, packing) -> float32 [tokens], the squared norm of the output's error."""

_log = logging.getLogger(__name__)


class BitSensitivity:
    """Measures one layer after the other; an interrupted one goes on after the last layer whose state is in `folder`.

    packings: for each projection (gate_up, down). identity: what the state must have been computed from.
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
        self._checkpoint, self._solver, self._packings, self._run_all = checkpoint, solver, packings, run_all
        self._products = fast_products(checkpoint)
        self._model = LayerForward(checkpoint, self._products)
        count = max(1, min(len(tokens.windows), TOKENS // tokens.windows.shape[1]))
        spread = [i * (len(tokens.windows) - 1) // max(1, count - 1) for i in range(count)]
        self._windows = tokens.windows[spread]
        self._weights = tokens.weights[spread].repeat_interleave(self._windows.shape[1])
        self._file = folder / STATE_FOLDER / _STATE
        parts = [identity, VERSION, packings, tokens.sha256, solver.version]
        self._identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def measure(self, progress: Callable[[int], None]) -> list[dict[str, dict[str, float]]]:
        """Of each layer: projection -> packing -> error. `progress` is told how many layers are done.

        SourceError naming the layer where activations are infinite or NaN.
        """
        found, stream = self._restore()
        for layer in range(len(found), self._checkpoint.architecture.num_hidden_layers):
            progress(layer)
            _log.info("measuring what bits are worth: layer %d", layer)
            errors, stream = self._layer(layer, stream)
            found.append(errors)
            write_state(self._file, self._identity, found, stream)
        return found

    def _restore(self) -> tuple[list[dict[str, dict[str, float]]], Tensor]:
        """What was measured before, and the activations after it."""
        shape = (*self._windows.shape, self._checkpoint.architecture.hidden_size)
        if kept := read_state(self._file, self._identity, shape):
            return kept
        stream = torch.empty(shape)
        self._model.embed(self._windows.flatten(), stream.flatten(0, 1))
        return [], stream

    def _layer(self, layer: int, stream: Tensor) -> tuple[dict[str, dict[str, float]], Tensor]:
        attention = self._model.attention(layer, stream.shape[1])
        parts = [partial(attention, part) for part in torch.split(stream, _WINDOWS_AT_ONCE)]
        residual = torch.cat([after for after, _, _ in self._run_all(parts)])
        norm = self._model.norm(f"model.layers.{layer}.post_attention_layernorm.weight")
        inputs = norm(residual).flatten(0, 1)
        *_, scores, chosen = self._model.router(layer)(inputs)
        reached = [torch.where(chosen == e) for e in range(self._checkpoint.architecture.num_local_experts)]
        tasks = [
            partial(self._expert, layer, e, inputs[tokens], self._weights[tokens])
            for e, (tokens, _) in enumerate(reached)
        ]
        after = residual.flatten(0, 1).clone()
        total = {(p, name): torch.zeros(len(after)) for p, names in self._packings.items() for name in names}
        for (tokens, place), (output, energies) in zip(reached, self._run_all(tasks), strict=True):
            score = scores[tokens, place]
            after.index_add_(0, tokens, output * score[:, None])
            for key, energy in energies.items():
                total[key].index_add_(0, tokens, energy * score.square())
        weighted = (self._weights / after.square().sum(1).clamp_min(1e-30)).double()
        errors: dict[str, dict[str, float]] = {p: {} for p in self._packings}
        for (projection, name), energy in total.items():
            error = float((weighted * energy).sum() / self._weights.double().sum())
            errors[projection][name] = error
        if not bool(torch.isfinite(after).all()) or not all(
            e < float("inf") for d in errors.values() for e in d.values()
        ):
            raise SourceError(
                f"{self._checkpoint.folder}: layer {layer}: the calibration's activations are infinite or NaN",
                "the checkpoint is damaged or its training diverged; convert without a target of bits",
            )
        return errors, after.view_as(residual)

    def _expert(self, layer: int, expert: int, x: Tensor, weights: Tensor) -> tuple[Tensor, Energies]:
        """An expert's output, float32 [n, hidden], of its inputs x [n, hidden], and what each packing adds to it.

        weights: float32 [n], of the tokens.
        """
        gate, up, down = (self._checkpoint.experts[ExpertTensor(layer, expert, p)] for p in ("gate", "up", "down"))
        rows, hidden = gate.shape
        statistics = _statistics(x, weights)
        x, inner = x.to(self._products), torch.empty(len(x), rows, dtype=self._products)
        sampled = _sample(rows)
        lost: dict[str, list[Tensor]] = {name: [] for name in self._packings["gate_up"]}
        for begin in range(0, rows, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, rows)
            both = [self._checkpoint.read_rows(w, begin, end) for w in (gate, up)]
            inner[:, begin:end] = inner_activations(x, *(w.to(self._products) for w in both))
            here = sampled[begin:end]
            for name, parts in lost.items():
                found = inner_activations(
                    x, *(self._quantized(w[here], name, statistics).to(self._products) for w in both)
                )
                parts.append(found - inner[:, begin:end][:, here].float())
        missing = {name: torch.cat(parts, 1).to(self._products) for name, parts in lost.items()}
        output, share = torch.empty(len(x), hidden), float(sampled.double().mean())
        energies = {(p, name): torch.zeros(len(x)) for p, names in self._packings.items() for name in names}
        some, statistics = _sample(hidden), _statistics(inner.float(), weights)
        for begin in range(0, hidden, ROWS_AT_ONCE):
            end = min(begin + ROWS_AT_ONCE, hidden)
            block = self._checkpoint.read_rows(down, begin, end)
            weight = block.to(self._products)
            output[:, begin:end] = inner @ weight.T
            columns = weight[:, sampled].T.contiguous()
            for name, part in missing.items():
                energies["gate_up", name] += (part @ columns).float().square().sum(1) / share
            own = block[some[begin:end]]
            for name in self._packings["down"]:
                error = (self._quantized(own, name, statistics) - own.float()).to(self._products)
                energies["down", name] += (inner @ error.T).float().square().sum(1) / float(some.double().mean())
        return output, energies

    def _quantized(self, rows: Tensor, name: str, statistics: InputStatistics) -> Tensor:
        """Some rows, quantized, float32."""
        if not len(rows):
            return rows.float()
        packing = tile_packing_named(name)
        tiles = torch.empty(packing.stored_shape(*rows.shape), dtype=torch.uint8)
        try:
            self._solver.solve_calibrated(rows.contiguous(), packing, tiles, statistics)
        except SingularStatisticsError:
            self._solver.solve(rows.contiguous(), packing, tiles)
        return packing.weights(tiles, *rows.shape)


def _statistics(x: Tensor, weights: Tensor) -> InputStatistics:
    """In blocks of columns, shrunk towards their diagonal, as the tokens may be fewer than the columns of a block."""
    moment = block_moments(x, weights, DOWN_BLOCK) / weights.double().sum().clamp_min(1e-30).float()
    diagonal = InputStatistics(torch.diag_embed(moment.diagonal(dim1=1, dim2=2)), 1.0)
    return InputStatistics(moment, effective_tokens(weights)).shrunk(diagonal, PRIOR_SHARE * DOWN_BLOCK)


def _sample(rows: int) -> Tensor:
    """Which of so many rows are quantized: bool [rows], whole tiles, evenly spread."""
    return torch.arange(rows) // TILE_ROWS % max(1, rows // _SAMPLED_ROWS) == 0
