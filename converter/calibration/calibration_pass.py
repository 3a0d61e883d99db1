"""The calibration pass: takes tokens through the original, one layer after the other."""

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
"""Version of the statistics, part of a conversion's fingerprint. A change of them adds one."""

STATE_FOLDER = ".moe-convert.calibration"
_STATE_NAME = "state"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamState:
    """The stream before decoder layer `position`.

    activations: float32 [windows, window, hidden].
    """

    position: int
    activations: Tensor


NOT_LOADED = StreamState(-1, torch.empty(0))
"""No activations are in memory."""


class CalibrationPass:
    """Gathers the statistics of one decoder layer after the other.

    Ascending order is fastest: a step back starts again from the stored or first layer.
    `finish(layer)` stores the activations in `folder` for a resume.

    identity: JSON value; stored activations with another identity are discarded. run_all: runs
    tasks on the workers. down_width: columns of a block of down's statistics.
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
        self._file = folder / STATE_FOLDER / _STATE_NAME
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._state = NOT_LOADED

    def prepare(self, layer: int, *, gather: bool = True) -> LayerStatistics:
        """Take the tokens through decoder layer `layer` and return its statistics.

        Earlier layers are passed first if necessary. With `gather` False the statistics are empty,
        for a layer that is not quantized.
        """
        self._go_to(layer)
        return self._forward(layer, gather=gather)

    def finish(self, layer: int) -> None:
        """Store the state after `layer`, the last prepared one, once all of it is quantized."""
        state = self._state
        if state.position == layer + 1:
            write_state(self._file, self._identity, state.position, state.activations)

    def prepare_head(self) -> LayerStatistics:
        """Take the tokens through all remaining layers and return the output head's statistics."""
        self._go_to(self._forward_pass.layers)
        inputs = [self._forward_pass.head_inputs(window) for window in self._state.activations]
        head = whole_statistics(
            self._checkpoint, None, "the output head", inputs, self._weights, self._run_all
        )
        return LayerStatistics({self._forward_pass.head: head})

    def _go_to(self, layer: int) -> None:
        if not 0 <= self._state.position <= layer:
            self._state = self._stored(layer)
        while self._state.position < layer:
            self._forward(self._state.position, gather=False)

    def _stored(self, layer: int) -> StreamState:
        """Return the stored state if it is at or before `layer`, else the state before layer 0."""
        shape = (*self._windows.shape, self._forward_pass.hidden_size)
        stored = read_state(self._file, self._identity, shape)
        if stored and stored[0] <= layer:
            return StreamState(*stored)
        stream = torch.empty(shape)
        self._forward_pass.embed(self._windows, stream, WINDOWS_AT_ONCE)
        return StreamState(0, stream)

    def _forward(self, layer: int, *, gather: bool) -> LayerStatistics:
        """Take the tokens through `layer`, the next one."""
        _log.info("calibration: layer %d", layer)
        stream = self._state.activations
        # The activations change in place: an interruption within the layer makes them invalid.
        self._state = NOT_LOADED
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
        self._state = StreamState(layer + 1, stream)
        return statistics
