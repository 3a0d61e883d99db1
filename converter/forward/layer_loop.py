"""The loop over the tokens of one decoder layer: up to the experts, the experts, to the end."""

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
    """Sizes of the parts; they decide the order of sums, and so the last bits of the results.

    windows: windows in one run of the layer. tokens: tokens in a piece of one expert. experts:
    experts whose outputs are in memory until they are added.
    """

    windows: int
    tokens: int
    experts: int


@dataclass(frozen=True)
class Piece:
    """Some of the tokens that chose an expert, from number `begin` of them on.

    layer: ordinal among the layers with experts. tokens: positions, int64 [n]. scores: float32 [n].
    """

    layer: int
    expert: int
    begin: int
    tokens: Tensor
    scores: Tensor


class LayerWork:
    """Observes a layer's tokens and computes its experts. This one observes nothing.

    Only `expert` runs on workers; the loop's thread calls the other methods, always in one order.
    """

    wanted: frozenset[str] = frozenset()
    """Module paths of the linears whose inputs `take_linears` receives."""

    def __init__(self, experts: ExpertForward) -> None:
        self._experts = experts

    def take_linears(self, inputs: list[Inputs]) -> None:
        """Receive the inputs of wanted linears, one entry per part of the windows, in order."""

    def take_routed(self, routed: Routed) -> None:
        """Receive the experts' inputs and the router's choice."""

    def start_expert(self, expert: int, tokens: Tensor) -> None:
        """Receive the tokens (int64 [n]) that chose an expert, before it is computed.

        Experts come in ascending order.
        """

    def expert(self, piece: Piece, x: Tensor) -> tuple[Tensor, Any]:
        """Return a piece's outputs, float32 [n, hidden], and a value for `take_expert`.

        x: the piece's inputs, float32 [n, hidden].
        """
        return self._experts.output(piece.layer, piece.expert, x), None

    def take_expert(self, piece: Piece, value: Any) -> None:
        """Receive the second result of `expert`. Pieces come in order."""


class LayerLoop:
    """Takes the stream through decoder layers of `forward`.

    Memory holds for the current layer: its weights without the experts'; per worker, a slice of an
    expert's matrices or the activations of `steps.windows` windows; for all tokens, the experts'
    inputs and the sum of their outputs, float32 [tokens, hidden] each, from `allocate`; and the
    outputs of `steps.experts` experts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        forward: LayerForward,
        steps: Steps,
        run_all: RunAll,
        allocate: Callable[[tuple[int, ...]], Tensor] = torch.zeros,
    ) -> None:
        """allocate: returns float32 zeros of a shape."""
        self._checkpoint = checkpoint
        self._forward = forward
        self._steps = steps
        self._run_all = run_all
        self._allocate = allocate

    def pass_layer(self, number: int, stream: Tensor, work: LayerWork) -> None:
        """Take the stream, float32 [windows, window, hidden], through a decoder layer in place.

        SourceError with the layer if activations are infinite or NaN.
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

        input_parts = torch.split(inputs, rows)
        results = self._run_all(
            [partial(begin, *pair) for pair in zip(parts, input_parts, strict=True)]
        )
        self._check(all(finite for *_, finite, _ in results), number, "after attention")
        chosen = torch.cat([chosen for chosen, *_ in results])
        scores = torch.cat([scores for _, scores, *_ in results])
        return Routed(inputs, chosen, scores), [heard for *_, heard in results]

    def _through_experts(self, layer: int, routed: Routed, work: LayerWork) -> Tensor:
        """Return the weighted sum of the experts' outputs, float32 [tokens, hidden]."""
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
            for piece, (output, value) in zip(pieces, self._run_all(tasks), strict=True):
                summed.index_add_(0, piece.tokens, output.mul_(piece.scores[:, None]))
                work.take_expert(piece, value)
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

        results = self._run_all([partial(end, *pair) for pair in pairs])
        self._check(all(finite for finite, _ in results), number, "after its experts")
        if wanted:
            work.take_linears([heard for _, heard in results])

    def _check(self, finite: bool, number: int, where: str) -> None:
        if not finite:
            raise overflow_error(self._checkpoint, number, f"layer {number}: {where}")


def _compute(work: LayerWork, piece: Piece, inputs: Tensor) -> tuple[Tensor, Any]:
    return work.expert(piece, inputs[piece.tokens])


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
