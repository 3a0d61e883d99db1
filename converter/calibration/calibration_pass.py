"""The calibration pass: tokens go through the original layer by layer; the inputs of its linears
are summed up.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.calibration.calibration_text import CalibrationTokens
from converter.calibration.layer_gatherer import LayerGatherer, whole_statistics
from converter.calibration.layer_statistics import DOWN_BLOCK, LayerStatistics
from converter.calibration.pass_memory import TOKENS_AT_ONCE, WINDOWS_AT_ONCE, experts_at_once
from converter.calibration.state_file import read_state, write_state
from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import fast_products
from converter.forward.layer_forward import LayerForward
from converter.forward.layer_loop import LayerLoop, LayerWork, Steps
from converter.forward.ordered_tasks import RunAll

VERSION = 3
"""Of everything here that the statistics depend on: part of a conversion's fingerprint."""

STATE_FOLDER = ".moe-convert.calibration"
_STATE = "state"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stand:
    """Where the tokens are: before decoder layer `position`. activations: float32 [windows, window,
    hidden].
    """

    position: int
    activations: Tensor


OUTSIDE = Stand(-1, torch.empty(0))
"""The tokens are not in memory."""


class CalibrationPass:
    """Gathers the statistics of one decoder layer after the other, best in ascending order.

    `finish(layer)` stores the activations in `folder`, for a resume. `identity` is what they must
    have been computed from. run_all runs tasks on the workers. down_width: columns of a block of
    down's statistics.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: CalibrationTokens,
        folder: Path,
        identity: Any,
        run_all: RunAll,
        down_width: int = DOWN_BLOCK,
    ) -> None:
        self._checkpoint = checkpoint
        self._forward_pass = LayerForward(checkpoint, fast_products(checkpoint))
        self._run_all = run_all
        self._down_width = down_width
        steps = Steps(WINDOWS_AT_ONCE, TOKENS_AT_ONCE, experts_at_once(down_width))
        self._loop = LayerLoop(checkpoint, self._forward_pass, steps, run_all)
        self._windows = tokens.windows
        self._weights = tokens.weights.repeat_interleave(tokens.windows.shape[1])
        self._state = folder / STATE_FOLDER / _STATE
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._stand = OUTSIDE

    def prepare(self, layer: int, *, gather: bool = True) -> LayerStatistics:
        """Return the statistics of decoder layer `layer`, after passing through the layers before
        it where need be.

        Without `gather` it only goes through, and the statistics are empty: nothing of the layer is
        quantized.
        """
        self._go_to(layer)
        return self._forward(layer, gather=gather)

    def finish(self, layer: int) -> None:
        """Store where the pass stands, once everything of `layer`, the last that was prepared, is
        quantized.
        """
        if self._stand.position == layer + 1:
            write_state(self._state, self._identity, self._stand.position, self._stand.activations)

    def prepare_head(self) -> LayerStatistics:
        """Return the statistics of the output head, after passing through all layers."""
        self._go_to(self._forward_pass.layers)
        inputs = [self._forward_pass.head_inputs(window) for window in self._stand.activations]
        head = whole_statistics(
            self._checkpoint, None, "the output head", inputs, self._weights, self._run_all
        )
        return LayerStatistics({self._forward_pass.head: head})

    def _go_to(self, layer: int) -> None:
        if not 0 <= self._stand.position <= layer:
            self._stand = self._stored(layer)
        while self._stand.position < layer:
            self._forward(self._stand.position, gather=False)

    def _stored(self, layer: int) -> Stand:
        """The stored activations, if they stand at or before `layer`; else those before the first
        layer.
        """
        shape = (*self._windows.shape, self._forward_pass.hidden_size)
        kept = read_state(self._state, self._identity, shape)
        if kept and kept[0] <= layer:
            return Stand(*kept)
        stream = torch.empty(shape)
        self._forward_pass.embed(self._windows, stream, WINDOWS_AT_ONCE)
        return Stand(0, stream)

    def _forward(self, layer: int, *, gather: bool) -> LayerStatistics:
        """Take the tokens through `layer`, before which they stand."""
        _log.info("calibration: layer %d", layer)
        stream = self._stand.activations
        # The activations change in place: after an interruption in the layer they are of no use.
        self._stand = OUTSIDE
        if gather:
            gatherer = LayerGatherer(
                self._checkpoint,
                self._forward_pass,
                layer,
                self._weights,
                self._down_width,
                self._run_all,
            )
            self._loop.pass_layer(layer, stream, gatherer)
            statistics = gatherer.statistics
        else:
            self._loop.pass_layer(layer, stream, LayerWork(self._forward_pass.experts))
            statistics = LayerStatistics({})
        self._stand = Stand(layer + 1, stream)
        return statistics
