"""Gathers the statistics of one layer while the tokens go through it."""

import torch
from torch import Tensor

from converter.calibration.layer_statistics import ExpertInputs, LayerStatistics, rows_at_once
from converter.calibration.moments import block_moments, effective_tokens, second_moment
from converter.checkpoint.bad_weights import overflow_error
from converter.checkpoint.source import Checkpoint
from converter.forward.expert_forward import SliceVisitor
from converter.forward.layer_forward import LayerForward
from converter.forward.layer_loop import LayerWork, Piece
from converter.forward.loaded_layer import Inputs, Routed
from converter.forward.ordered_tasks import RunAll
from converter.input_statistics import InputStatistics

ROWS_IN_A_PART = 2048
"""Rows of activations whose moments are summed at once."""


class LayerGatherer(LayerWork):
    """Sums the second moments of the inputs of decoder layer `number`.

    weights: of the tokens, float32 [tokens]. down_width: columns of a block of down's statistics.
    The methods raise SourceError for sums that are infinite or NaN.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        forward: LayerForward,
        number: int,
        weights: Tensor,
        down_width: int,
        run_all: RunAll,
    ) -> None:
        super().__init__(forward.experts)
        self.wanted = forward.packable(number)
        self._checkpoint = checkpoint
        self._products = forward.products
        self._number = number
        self._weights = weights
        self._width = down_width
        self._run_all = run_all
        self._linears: dict[str, InputStatistics] = {}
        self._routed: list[tuple[Tensor, InputStatistics]] = []
        self._inputs: list[ExpertInputs] = []
        columns = [
            module.intermediate
            for module in checkpoint.shape.experts
            if module.decoder_layer == number
        ]
        self._intermediate = max(columns, default=0)
        self._down = torch.zeros(self._down_shape)

    @property
    def statistics(self) -> LayerStatistics:
        """Statistics of the layer; complete after all tokens passed it."""
        if not self._routed:
            return LayerStatistics(self._linears)
        (inputs, gate_up) = self._routed[0]
        weight = sum(float(self._weights[e.tokens].double().sum()) for e in self._inputs)
        return LayerStatistics(
            self._linears,
            inputs,
            self._weights,
            self._inputs,
            gate_up,
            InputStatistics(self._down / weight, effective_tokens(self._weights)),
            self._products,
        )

    def take_linears(self, inputs: list[Inputs]) -> None:
        """Implement `LayerWork.take_linears`. Linears with the same input share statistics."""
        first = inputs[0]
        for module, x in first.items():
            twin = next(
                (other for other in self._linears if other in first and first[other] is x), None
            )
            if twin is None:
                parts = [part[module].flatten(0, -2).float() for part in inputs]
                self._linears[module] = self._whole(
                    parts, f"layer {self._number}, the inputs of {module}"
                )
            else:
                self._linears[module] = self._linears[twin]

    def take_routed(self, routed: Routed) -> None:
        """Implement `LayerWork.take_routed`."""
        parts = list(torch.split(routed.inputs, ROWS_IN_A_PART))
        self._routed = [
            (routed.inputs, self._whole(parts, f"layer {self._number}, its experts' inputs"))
        ]

    def start_expert(self, expert: int, tokens: Tensor) -> None:
        """Implement `LayerWork.start_expert`."""
        inner = torch.empty(len(tokens), self._intermediate, dtype=torch.bfloat16)
        self._inputs.append(ExpertInputs(tokens, inner))

    def expert(self, piece: Piece, x: Tensor) -> tuple[Tensor, Tensor]:
        """Implement `LayerWork.expert`; also return the moments of down's inputs."""
        inner = self._inputs[piece.expert].inner[piece.begin : piece.begin + len(piece.tokens)]
        sums = torch.zeros(self._down_shape)
        visitor = _InnerMoments(inner, self._weights[piece.tokens], sums, self._width)
        return self._experts.output(piece.layer, piece.expert, x, visitor), sums

    def take_expert(self, piece: Piece, found: Tensor) -> None:
        """Implement `LayerWork.take_expert`."""
        self._down += found

    @property
    def _down_shape(self) -> tuple[int, int, int]:
        return -(-self._intermediate // self._width), self._width, self._width

    def _whole(self, parts: list[Tensor], what: str) -> InputStatistics:
        return whole_statistics(
            self._checkpoint, self._number, what, parts, self._weights, self._run_all
        )


class _InnerMoments(SliceVisitor):
    """Stores down's inputs in `inner` and their moments in `sums`."""

    def __init__(self, inner: Tensor, weights: Tensor, sums: Tensor, width: int) -> None:
        self.rows_at_once = rows_at_once(width)
        self._inner = inner
        self._weights = weights
        self._sums = sums
        self._width = width

    def gate_up(self, begin: int, gate: Tensor, up: Tensor, inner: Tensor) -> None:
        end = begin + inner.shape[1]
        self._inner[:, begin:end] = inner
        blocks = slice(begin // self._width, -(-end // self._width))
        self._sums[blocks] = block_moments(inner, self._weights, self._width)


def whole_statistics(
    checkpoint: Checkpoint,
    layer: int | None,
    what: str,
    parts: list[Tensor],
    weights: Tensor,
    run_all: RunAll,
) -> InputStatistics:
    """Return the full-width statistics of a linear over all tokens.

    parts: its inputs, float32 [n, columns] each. layer: its decoder layer, None for the head.
    Raises SourceError with `what` if the statistics are infinite or NaN.
    """
    moment = second_moment(parts, weights, run_all) / weights.double().sum()
    if not bool(torch.isfinite(moment).all()):
        raise overflow_error(checkpoint, layer, what)
    return InputStatistics(moment.float()[None], effective_tokens(weights))
