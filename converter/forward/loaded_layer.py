"""One decoder layer of transformers with its weights; the caller computes the experts.

The layer runs twice. The first run ends at the experts, by an exception that carries their inputs.
The second run gets the sum of the experts' outputs and goes through to the end. So transformers'
own code computes everything around the experts: norms, residuals, multipliers, shared experts.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from converter.forward.layer_calls import LayerCall, cannot_run_alone

Inputs = dict[str, Tensor]
"""Module path of a linear -> its inputs, [..., columns]."""


@dataclass(frozen=True)
class Routed:
    """The arguments of a layer's experts.

    inputs: float32 [tokens, hidden]. chosen: each token's experts, int64 [tokens, k]. scores: their
    weights, float32 [tokens, k].
    """

    inputs: Tensor
    chosen: Tensor
    scores: Tensor


@dataclass(frozen=True)
class LayerRun:
    """One run of a layer in one thread.

    wanted: module paths of the linears to record. inputs: their recorded inputs. sums: the sum of
    the experts' outputs, empty in the first run.
    """

    wanted: frozenset[str] = frozenset()
    inputs: Inputs = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)


class CurrentRun(threading.local):
    """The current run of each thread."""

    run = LayerRun()


class ExpertsReached(Exception):
    """Ends a run at the experts; carries the experts' arguments."""


class AbsentExperts(nn.Module):
    """Replaces an experts module."""

    def __init__(self, current: CurrentRun) -> None:
        super().__init__()
        self._current = current

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the experts' outputs if the run has it; else end the run."""
        sums = self._current.run.sums
        if not sums:
            raise ExpertsReached(hidden, index, weights)
        return sums.pop().to(hidden.dtype)


class HeardLinear(nn.Module):
    """Replaces a linear: multiplies in the weight's dtype, returns float32, records its inputs."""

    def __init__(self, linear: nn.Linear, path: str, current: CurrentRun) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._path = path
        self._current = current

    def forward(self, x: Tensor) -> Tensor:
        """Return x · weightᵀ + bias."""
        run = self._current.run
        if self._path in run.wanted:
            run.inputs[self._path] = x
        product = functional.linear(x.to(self.weight.dtype), self.weight).float()
        return product if self.bias is None else product + self.bias


class LoadedLayer:
    """A decoder layer whose weights are in memory. Thread-safe.

    experts: ordinal among the layers with experts, None for a layer without. where: path of
    config.json, for errors.
    """

    def __init__(
        self,
        layer: nn.Module,
        call: LayerCall,
        current: CurrentRun,
        experts: int | None,
        where: str,
    ) -> None:
        self._where = where
        self.experts = experts
        self._layer = layer
        self._call = call
        self._current = current

    def begin(self, stream: Tensor, wanted: frozenset[str] = frozenset()) -> tuple[Routed, Inputs]:
        """Run the layer on windows, float32 [n, window, hidden], up to its experts.

        Return the experts' arguments, and the inputs of the `wanted` linears that were called.
        """
        run = LayerRun(wanted)
        try:
            self._run(stream, run)
        except ExpertsReached as reached:
            inputs, chosen, scores = reached.args
            return Routed(inputs.float(), chosen, scores.float()), run.inputs
        raise cannot_run_alone(
            self._where, f"{type(self._layer).__name__} does not call its experts"
        )

    def end(
        self, stream: Tensor, summed: Tensor | None, wanted: frozenset[str] = frozenset()
    ) -> tuple[Tensor, Inputs]:
        """Run the whole layer on the same windows.

        summed: weighted sum of the experts' outputs, float32 [tokens, hidden]; None for a layer
        without experts. Return the stream after the layer, and the inputs of the `wanted` linears.
        """
        run = LayerRun(wanted, sums=[] if summed is None else [summed])
        try:
            return self._run(stream, run), run.inputs
        except ExpertsReached:
            raise cannot_run_alone(
                self._where, f"{type(self._layer).__name__} calls its experts twice"
            ) from None

    @torch.no_grad()
    def _run(self, stream: Tensor, run: LayerRun) -> Tensor:
        self._current.run = run
        try:
            out: Any = self._layer(stream, *self._call.arguments, **self._call.keywords)
        finally:
            self._current.run = LayerRun()
        stream_after: Tensor = out[0] if isinstance(out, tuple) else out
        return stream_after
