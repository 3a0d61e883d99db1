"""The calibration pass: tokens go through the original model layer by layer, and each linear's inputs are summed up.

In memory are one layer's attention, a slice of one expert's weights per worker, and the activations of the tokens,
whatever the model's size. Everything is computed in pieces whose sizes are fixed, by one thread each, and summed in a
fixed order: the same numbers for any number of workers, and after any interruption.
"""

import hashlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.bad_weights import overflow_error
from converter.calibration_text import CalibrationTokens
from converter.layer_forward import LayerForward, fast_products
from converter.layer_statistics import DOWN_BLOCK, ExpertInputs, LayerStatistics, rows_at_once
from converter.source import Checkpoint
from converter.state_file import read_state, write_state
from converter.statistics import InputStatistics, RunAll, block_moments, effective_tokens, second_moment
from formats.index import Architecture

VERSION = 2
"""Of everything here that the statistics depend on: part of a conversion's fingerprint."""

STATE_FOLDER = ".moe-convert.calibration"

_WINDOWS_AT_ONCE = 4
_TOKENS_AT_ONCE = 1024
_EXPERTS_AT_ONCE = 8
"""Whose outputs and moments are in memory until they are added, in the experts' order."""
_STATE = "state"

_log = logging.getLogger(__name__)


class CalibrationPass:
    """Statistics for one layer after the other, in ascending order.

    `prepare(layer)`, then from any thread `linear` and `layer`, then `finish(layer)`, which stores the activations in
    `folder` for a resume. `identity` is what they must have been computed from. run_all runs tasks on the workers.
    down_width: columns of a block of down's statistics.
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
        self._down_width = down_width
        self._checkpoint = checkpoint
        self._products = fast_products(checkpoint)
        self._model = LayerForward(checkpoint, self._products)
        self._tokens = tokens
        self._folder = folder / STATE_FOLDER
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._run_all = run_all
        self._weights = tokens.weights.repeat_interleave(tokens.windows.shape[1])
        self._position = -1
        self._activations: Tensor | None = None
        self._after: Tensor | None = None
        self._layer: LayerStatistics | None = None
        self._head: InputStatistics | None = None

    def prepare(self, layer: int, *, gather: bool = True) -> None:
        """Gathers the statistics of `layer`, after passing through the layers before it where need be.

        Without `gather` it only goes through: nothing of the layer is quantized.
        """
        if self._activations is None or self._position > layer:
            self._restore(layer)
        while self._position < layer:
            self._after = self._forward(self._position, gather=False)
            self._step()
        self._after = self._forward(layer, gather=gather)

    def finish(self, layer: int) -> None:
        """Everything of `layer` is quantized: forgets its statistics and stores where the pass stands."""
        if self._position != layer or self._after is None:
            return
        self._step()
        assert self._activations is not None
        write_state(self._folder / _STATE, self._identity, self._position, self._activations)

    def prepare_head(self) -> None:
        """Gathers the statistics of the output head."""
        last = self._checkpoint.architecture.num_hidden_layers
        if self._activations is None or self._position > last:
            self._restore(last)
        while self._position < last:
            self._after = self._forward(self._position, gather=False)
            self._step()
        assert self._activations is not None
        norm = self._model.norm("model.norm.weight")
        self._head = self._full(None, "the output head", norm(self._activations).flatten(0, 1))

    def linear(self, module: str) -> InputStatistics:
        """Of the trunk's matrix `module`."""
        if module == "lm_head":
            assert self._head
            return self._head
        return self.layer.linears[module.rpartition(".")[2]]

    @property
    def layer(self) -> LayerStatistics:
        """Of the prepared layer."""
        assert self._layer
        return self._layer

    def _step(self) -> None:
        self._activations, self._after, self._layer = self._after, None, None
        self._position += 1

    def _restore(self, layer: int) -> None:
        """The stored activations, if they stand at or before `layer`; else those of the embeddings."""
        shape = (*self._tokens.windows.shape, self._checkpoint.architecture.hidden_size)
        kept = read_state(self._folder / _STATE, self._identity, shape)
        if kept and kept[0] <= layer:
            self._position, self._activations = kept
        else:
            self._position, self._activations = 0, self._embed()

    def _embed(self) -> Tensor:
        windows = self._tokens.windows
        result = torch.empty(*windows.shape, self._checkpoint.architecture.hidden_size)
        self._model.embed(windows.flatten(), result.flatten(0, 1))
        return result

    def _forward(self, layer: int, *, gather: bool) -> Tensor:
        """The activations after `layer`; with `gather`, also sets its statistics."""
        _log.info("calibration: layer %d", layer)
        assert self._activations is not None
        residual, linears = self._attention(layer, gather)
        self._check(residual, layer, f"layer {layer}: after attention")
        norm = self._model.norm(f"model.layers.{layer}.post_attention_layernorm.weight")
        router = self._model.router(layer)
        inputs = norm(residual).flatten(0, 1)
        *_, scores, chosen = router(inputs)
        after, experts, pooled = residual.flatten(0, 1), [], torch.zeros(self._down_shape())
        n_experts = self._checkpoint.architecture.num_local_experts
        at_once = _experts_at_once(self._down_width)
        for begin in range(0, n_experts, at_once):
            reached = {e: torch.where(chosen == e) for e in range(begin, min(begin + at_once, n_experts))}
            parts = [
                (e, tokens, place)
                for e, pair in reached.items()
                for tokens, place in zip(*(torch.split(t, _TOKENS_AT_ONCE) for t in pair), strict=True)
                if len(tokens)
            ]
            # Each task fills its rows.
            inner = {e: self._inner(len(tokens) if gather else 0) for e, (tokens, _) in reached.items()}
            rows = [part for e in reached for part in torch.split(inner[e], _TOKENS_AT_ONCE) if len(part)]
            tasks = [
                partial(self._expert, layer, e, inputs, part, rows[i] if gather else None)
                for i, (e, part, _) in enumerate(parts)
            ]
            for (_, tokens, place), (output, moments) in zip(parts, self._run_all(tasks), strict=True):
                after.index_add_(0, tokens, output * scores[tokens, place, None])
                pooled += moments
            experts += [ExpertInputs(tokens, inner[e]) for e, (tokens, _) in reached.items()]
        after = after.view_as(residual)
        self._check(after, layer, f"layer {layer}: after its experts")
        if gather:
            weight = sum(float(self._weights[e.tokens].double().sum()) for e in experts)
            self._layer = LayerStatistics(
                linears,
                inputs,
                self._weights,
                experts,
                gate_up=self._full(layer, f"layer {layer}", inputs),
                down=InputStatistics(pooled / weight, effective_tokens(self._weights)),
                products=self._products,
            )
        return after

    def _attention(self, layer: int, gather: bool) -> tuple[Tensor, dict[str, InputStatistics]]:
        """The residual stream after attention, and the statistics of its projections."""
        assert self._activations is not None
        activations = self._activations
        attention = self._model.attention(layer, activations.shape[1])
        begins = range(0, len(activations), _WINDOWS_AT_ONCE)
        results = self._run_all([partial(attention, activations[begin : begin + _WINDOWS_AT_ONCE]) for begin in begins])
        residual = torch.cat([r for r, _, _ in results])
        if not gather:
            return residual, {}
        shared = self._full(layer, f"layer {layer}, attention", torch.cat([n for _, n, _ in results]).flatten(0, 1))
        own = self._full(
            layer, f"layer {layer}, attention's output", torch.cat([m for _, _, m in results]).flatten(0, 1)
        )
        return residual, {"q_proj": shared, "k_proj": shared, "v_proj": shared, "o_proj": own}

    def _expert(
        self, layer: int, expert: int, inputs: Tensor, tokens: Tensor, inner: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One expert's outputs [n, hidden] for `tokens`, and the sums of its down inputs' moments; fills `inner` with
        these inputs, and without it sums nothing."""
        moments, weights, width = torch.zeros(self._down_shape()), self._weights[tokens], self._down_width

        def add(column: int, found: Tensor) -> None:
            assert inner is not None
            inner[:, column : column + found.shape[1]] = found
            blocks = slice(column // width, -(-(column + found.shape[1]) // width))
            moments[blocks] = block_moments(found, weights, width)

        visit = None if inner is None else add
        return self._model.expert(layer, expert, inputs[tokens], visit, rows_at_once(width)), moments

    def _inner(self, tokens: int) -> Tensor:
        return torch.empty(tokens, self._checkpoint.architecture.intermediate_size, dtype=torch.bfloat16)

    def _down_shape(self) -> tuple[int, int, int]:
        width = self._down_width
        return -(-self._checkpoint.architecture.intermediate_size // width), width, width

    def _full(self, layer: int | None, what: str, x: Tensor) -> InputStatistics:
        moment = second_moment(x, self._weights, self._run_all) / self._weights.double().sum()
        self._check(moment, layer, what)
        return InputStatistics(moment.float()[None], effective_tokens(self._weights))

    def _check(self, values: Tensor, layer: int | None, where: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise overflow_error(self._checkpoint, layer, where)


def calibration_memory_bytes(architecture: Architecture, tokens: int, width: int) -> tuple[int, int]:
    """Peak memory, estimated: (of the pass, of each worker in addition); nothing for no tokens."""
    if not tokens:
        return 0, 0
    a = architecture
    hidden, attention = a.hidden_size, a.num_attention_heads * a.head_dim
    activations = tokens * 4 * (5 * hidden + 2 * attention + a.num_experts_per_tok * hidden)
    at_once = min(_experts_at_once(width), a.num_local_experts)
    parts = at_once + at_once * a.num_experts_per_tok * tokens // (a.num_local_experts * _TOKENS_AT_ONCE)
    moments = 4 * (2 * hidden**2 + attention**2 + (2 + parts) * a.intermediate_size * width)
    moments += 2 * tokens * a.num_experts_per_tok * a.intermediate_size
    weights = 4 * hidden * attention * 4
    slices = 4 * (3 * rows_at_once(width) * hidden + min(tokens, _TOKENS_AT_ONCE) * (a.intermediate_size + 2 * hidden))
    factors = 4 * 7 * hidden**2 + tokens * hidden * 4
    # Down's correction solves in float64; counted as blocks of float32.
    correction = 4 * 15 * a.intermediate_size * width
    return activations + moments + weights, max(slices, factors, correction)


def _experts_at_once(width: int) -> int:
    """As many whose moments take no more memory than those of _EXPERTS_AT_ONCE in blocks of DOWN_BLOCK, if any."""
    return max(1, _EXPERTS_AT_ONCE * DOWN_BLOCK // width)
