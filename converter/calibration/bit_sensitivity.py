"""Sensitivity of each layer to fewer bits, measured on the outputs of its experts.

Some of the calibration tokens go through the original model once. For each projection and packing a
sample of rows is quantized (`expert_costs.py`) and the layer's output error is estimated: the mean
over tokens of ‖error‖² / ‖stream after the layer‖². Errors of different rows and experts count as
independent. docs/quality.md shows how well this predicts which layers need more bits.
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
from converter.calibration.expert_costs import Energies, ExpertCosts, RowQuantizer
from converter.calibration.state_file import read_state, write_state
from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import ExpertForward, fast_products
from converter.forward.layer_forward import LayerForward
from converter.forward.layer_loop import LayerLoop, LayerWork, Piece, Steps
from converter.forward.ordered_tasks import RunAll
from converter.solvers.interface import CalibratedSolver
from formats.errors import SourceError

VERSION = 2
"""Version of the measured errors. A change that affects them adds one: old states are discarded."""

TOKENS = 2048
"""Largest number of calibration tokens that is used."""

_WINDOWS_AT_ONCE = 4
_STATE = "sensitivity.safetensors"

LayerErrors = dict[str, dict[str, float]]
"""projection -> packing -> error"""

_log = logging.getLogger(__name__)


class BitSensitivity:
    """Measures the layers in ascending order and stores the results in `folder` after each.

    packings: projection ("gate_up", "down") -> names. identity: JSON value; a stored state with
    another identity is discarded.
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
        self._quantizer = RowQuantizer(solver, packings, self._forward.products)
        count = max(1, min(len(tokens.windows), TOKENS // tokens.windows.shape[1]))
        spread = [i * (len(tokens.windows) - 1) // max(1, count - 1) for i in range(count)]
        self._windows = tokens.windows[spread]
        self._weights = tokens.weights[spread].repeat_interleave(self._windows.shape[1])
        # One piece holds all tokens of an expert: its statistics need all of them.
        max_experts = max(module.experts for module in checkpoint.shape.experts)
        steps = Steps(_WINDOWS_AT_ONCE, self._windows.numel(), max_experts)
        self._loop = LayerLoop(checkpoint, self._forward, steps, run_all)
        self._file = folder / STATE_FOLDER / _STATE
        parts = [identity, VERSION, packings, tokens.sha256, solver.version]
        self._identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def measure(self, progress: Callable[[int], None]) -> list[LayerErrors]:
        """Return the errors of each layer with experts, in order.

        progress: called with the number of layers measured. Raises SourceError with the layer if
        activations are infinite or NaN.
        """
        measured, stream = self._restore()
        layers = [module.decoder_layer for module in self._checkpoint.shape.experts]
        position = layers[len(measured) - 1] + 1 if measured else 0
        for layer in layers[len(measured) :]:
            progress(len(measured))
            for dense in range(position, layer):
                self._loop.pass_layer(dense, stream, LayerWork(self._forward.experts))
            _log.info("measuring the sensitivity to bits: layer %d", layer)
            measured.append(self._layer(layer, stream))
            write_state(self._file, self._identity, measured, stream)
            position = layer + 1
        return measured

    def _restore(self) -> tuple[list[LayerErrors], Tensor]:
        """Return the stored errors and the activations after their last layer."""
        shape = (*self._windows.shape, self._forward.hidden_size)
        if stored := read_state(self._file, self._identity, shape):
            return stored
        stream = torch.empty(shape)
        self._forward.embed(self._windows, stream, _WINDOWS_AT_ONCE)
        return [], stream

    def _layer(self, layer: int, stream: Tensor) -> LayerErrors:
        """Take the stream through decoder layer `layer`, in place, and return its errors."""
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
                f"{self._checkpoint.folder}: layer {layer}:"
                " errors of quantized experts are infinite or NaN",
                "the checkpoint is damaged or its training diverged; convert without --target-bpw",
            )
        return errors


class _Measurement(LayerWork):
    """Sums the error that each packing adds to the outputs of a layer's experts, by token."""

    def __init__(
        self, experts: ExpertForward, quantizer: RowQuantizer, intermediate: int, weights: Tensor
    ) -> None:
        super().__init__(experts)
        self._quantizer = quantizer
        self._intermediate = intermediate
        self._weights = weights
        self._energies = quantizer.zeros(len(weights))

    def expert(self, piece: Piece, x: Tensor) -> tuple[Tensor, Energies]:
        """Implement `LayerWork.expert`; also return the packings' energies."""
        costs = ExpertCosts(self._quantizer, x, self._weights[piece.tokens], self._intermediate)
        return self._experts.output(piece.layer, piece.expert, x, costs), costs.energies

    def take_expert(self, piece: Piece, found: Energies) -> None:
        """Implement `LayerWork.take_expert`."""
        for key, energy in found.items():
            self._energies[key].index_add_(0, piece.tokens, energy * piece.scores.square())

    def errors(self, after: Tensor) -> LayerErrors:
        """Return the mean over tokens of each packing's energy, relative to the stream's.

        after: the stream after the layer, float32 [tokens, hidden].
        """
        weighted = (self._weights / after.square().sum(1).clamp_min(1e-30)).double()
        total = self._weights.double().sum()
        errors: LayerErrors = {}
        for (projection, name), energy in self._energies.items():
            errors.setdefault(projection, {})[name] = float((weighted * energy).sum() / total)
        return errors
