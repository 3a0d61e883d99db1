"""The one loop that takes tokens through a decoder layer: up to the experts, through them, and on
to the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from converter.checkpoint.bad_weights import overflow_error
from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import ExpertForward
from converter.forward.layer_forward import LayerForward
from converter.forward.loaded_layer import Inputs, LoadedLayer, Routed
from converter.forward.ordered_tasks import RunAll


@dataclass(frozen=True)
class Steps:
    """How much goes through at once. The numbers decide the order of sums, and so the last bits."""

    windows: int
    """In one run of the layer."""
    tokens: int
    """In a piece of one expert."""
    experts: int
    """Whose outputs are in memory until they are added."""


@dataclass(frozen=True)
class Piece:
    """Some of the tokens that chose an expert, from the `begin`-th on: tokens, int64 [n]; their
    scores, float32 [n].
    """

    layer: int
    """Ordinal among the layers with experts."""
    expert: int
    begin: int
    tokens: Tensor
    scores: Tensor


class LayerWork:
    """What is done with a layer's tokens on their way. This one computes the experts and looks at
    nothing.

    Only `expert` runs on workers; the other methods are called by the loop's thread, in one order.
    """

    wanted: frozenset[str] = frozenset()
    """Module paths of the linears whose inputs are taken."""

    def __init__(self, experts: ExpertForward) -> None:
        self._experts = experts

    def take_linears(self, inputs: list[Inputs]) -> None:
        """Take the inputs of wanted linears: of each part of the windows, in order."""

    def take_routed(self, routed: Routed) -> None:
        """Take what the experts are given."""

    def start_expert(self, expert: int, tokens: Tensor) -> None:
        """Take the tokens (int64 [n]) that chose an expert, before it is computed. Experts come in
        ascending order.
        """

    def expert(self, piece: Piece, x: Tensor) -> tuple[Tensor, Any]:
        """Return the outputs, float32 [n, hidden], for a piece's inputs x, and what `take_expert`
        is to get.
        """
        return self._experts.output(piece.layer, piece.expert, x), None

    def take_expert(self, piece: Piece, found: Any) -> None:
        """Take what `expert` found. Pieces come in order."""


class LayerLoop:
    """Takes the stream through decoder layers of `forward`.

    In memory are, of the layer: its weights but for the experts'; for each worker, a slice of an
    expert's matrices, or the activations of `steps.windows` windows; for all tokens, the experts'
    inputs and the sum of their outputs, float32 [tokens, hidden] each, which `allocate` gives; and
    the outputs of `steps.experts` experts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        forward: LayerForward,
        steps: Steps,
        run_all: RunAll,
        allocate: Callable[[tuple[int, ...]], Tensor] = torch.zeros,
    ) -> None:
        """allocate: shape -> zeros, float32."""
        self._checkpoint = checkpoint
        self._forward = forward
        self._steps = steps
        self._run_all = run_all
        self._allocate = allocate

    def pass_layer(self, number: int, stream: Tensor, work: LayerWork) -> None:
        """Take the stream, float32 [windows, window, hidden], through decoder layer `number`, in
        place.

        SourceError naming the layer if activations are infinite or NaN.
        """
        parts = torch.split(stream, self._steps.windows)
        with self._forward.layer(number, stream.shape[1]) as layer:
            sums: list[Tensor | None] = [None] * len(parts)
            heard: frozenset[str] = frozenset()
            if layer.experts is not None:
                routed, inputs = self._begin(number, layer, parts, work.wanted)
                heard = frozenset(inputs[0])
                work.take_linears(inputs)
                del inputs
                work.take_routed(routed)
                summed = self._through_experts(layer.experts, routed, work)
                sums = list(torch.split(summed, self._steps.windows * stream.shape[1]))
            self._end(number, layer, list(zip(parts, sums, strict=True)), work, work.wanted - heard)

    def _begin(
        self, number: int, layer: LoadedLayer, parts: tuple[Tensor, ...], wanted: frozenset[str]
    ) -> tuple[Routed, list[Inputs]]:
        rows = [part.shape[0] * part.shape[1] for part in parts]
        hidden = self._checkpoint.shape.experts[layer.experts or 0].hidden
        inputs = self._allocate((sum(rows), hidden))

        def begin(part: Tensor, out: Tensor) -> tuple[Tensor, Tensor, bool, Inputs]:
            routed, heard = layer.begin(part, wanted)
            out.copy_(routed.inputs)
            return routed.chosen, routed.scores, _is_finite(out), heard

        found = self._run_all(
            [partial(begin, *pair) for pair in zip(parts, torch.split(inputs, rows), strict=True)]
        )
        self._check(all(finite for *_, finite, _ in found), number, "after attention")
        chosen, scores = (torch.cat([part[i] for part in found]) for i in (0, 1))
        return Routed(inputs, chosen, scores), [heard for *_, heard in found]

    def _through_experts(self, layer: int, routed: Routed, work: LayerWork) -> Tensor:
        """The weighted sum of the experts' outputs, float32 [tokens, hidden]."""
        summed = self._allocate(tuple(routed.inputs.shape))
        experts = range(self._checkpoint.shape.experts[layer].experts)
        for begin in experts[:: self._steps.experts]:
            pieces = []
            for expert in experts[begin : begin + self._steps.experts]:
                tokens, ranks = torch.where(routed.chosen == expert)
                work.start_expert(expert, tokens)
                scores = routed.scores[tokens, ranks]
                for first in range(0, len(tokens), self._steps.tokens):
                    part = slice(first, first + self._steps.tokens)
                    pieces.append(Piece(layer, expert, first, tokens[part], scores[part]))
            tasks = [partial(_compute, work, piece, routed.inputs) for piece in pieces]
            for piece, (output, found) in zip(pieces, self._run_all(tasks), strict=True):
                summed.index_add_(0, piece.tokens, output.mul_(piece.scores[:, None]))
                work.take_expert(piece, found)
        return summed

    def _end(
        self,
        number: int,
        layer: LoadedLayer,
        pairs: list[tuple[Tensor, Tensor | None]],
        work: LayerWork,
        wanted: frozenset[str],
    ) -> None:
        def end(part: Tensor, summed: Tensor | None) -> tuple[bool, Inputs]:
            out, heard = layer.end(part, summed, wanted)
            part.copy_(out)
            return _is_finite(part), heard

        found = self._run_all([partial(end, *pair) for pair in pairs])
        self._check(all(finite for finite, _ in found), number, "after its experts")
        if wanted:
            work.take_linears([heard for _, heard in found])

    def _check(self, finite: bool, number: int, where: str) -> None:
        if not finite:
            raise overflow_error(self._checkpoint, number, f"layer {number}: {where}")


def _compute(work: LayerWork, piece: Piece, inputs: Tensor) -> tuple[Tensor, Any]:
    return work.expert(piece, inputs[piece.tokens])


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
