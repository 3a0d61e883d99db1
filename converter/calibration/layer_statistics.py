"""Statistics of one layer's linears and experts.

Those of an expert are computed when it is quantized, which bounds memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from converter.calibration.moments import block_moments, effective_tokens, second_moment
from converter.forward.expert_forward import ROWS_AT_ONCE, inner_activations
from converter.forward.ordered_tasks import one_by_one
from converter.input_statistics import InputStatistics
from converter.solvers.down_correction import DownCorrection

DOWN_BLOCK = 256
"""Default columns of a block of down's statistics. Full width needs 822 MB per expert of 8x7B."""
PRIOR_SHARE = 0.25
"""Prior tokens per column of a block. The prior is the layer's statistics over all experts."""

Rows = Callable[[int, int], Tensor]
"""Returns rows begin..end (exclusive) of a matrix."""


@dataclass(frozen=True)
class ExpertInputs:
    """Inputs of one expert.

    tokens: indices of its tokens, int64 [n]. inner: inputs of down, bfloat16 [n, intermediate].
    """

    tokens: Tensor
    inner: Tensor


def _empty() -> InputStatistics:
    return InputStatistics(torch.empty(0, 0, 0), 0.0)


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one decoder layer; without experts, only `linears` is filled.

    linears: module path -> statistics, for linears that can be packed. inputs: the experts' inputs,
    float32 [tokens, hidden]. weights: of the tokens, float32 [tokens]. gate_up, down: statistics
    over all experts. products: dtype in which weights are multiplied.
    """

    linears: dict[str, InputStatistics]
    inputs: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    experts: list[ExpertInputs] = field(default_factory=list)
    gate_up: InputStatistics = field(default_factory=_empty)
    down: InputStatistics = field(default_factory=_empty)
    products: torch.dtype = torch.float32

    def gate_up_statistics(self, expert: int) -> tuple[InputStatistics, int]:
        """Return the statistics of an expert's gate and up, and the number of its tokens."""
        tokens = self.experts[expert].tokens
        weights = self.weights[tokens]
        if not len(weights):
            return self.gate_up, 0
        moment = second_moment([self.inputs[tokens]], weights, one_by_one) / float(
            weights.double().sum()
        )
        unshrunk = InputStatistics(moment[None], effective_tokens(weights))
        return unshrunk.shrunk(self.gate_up, PRIOR_SHARE * moment.shape[0]), len(weights)

    def down_statistics(
        self, expert: int, gate: Rows, up: Rows
    ) -> tuple[InputStatistics, DownCorrection | None]:
        """Return the statistics of an expert's down and a correction of its weights.

        Both are for the inputs that the quantized gate and up give; the correction compensates
        their errors. It is None if no token reached the expert, or the sums are not finite.
        """
        reached = self.experts[expert]
        weights = self.weights[reached.tokens]
        if not len(weights):
            return self.down, None
        x = self.inputs[reached.tokens].to(self.products)
        columns = reached.inner.shape[1]
        width = self.down.hessian.shape[1]
        step = rows_at_once(width)
        moment = torch.zeros(-(-columns // width), width, width)
        difference = torch.zeros_like(moment)
        for begin in range(0, columns, step):
            end = min(begin + step, columns)
            quantized = inner_activations(
                x, gate(begin, end).to(self.products), up(begin, end).to(self.products)
            )
            lost = reached.inner[:, begin:end].float() - quantized
            blocks = slice(begin // width, -(-end // width))
            moment[blocks] = block_moments(quantized, weights, width)
            difference[blocks] = block_moments(lost, weights, width, quantized)
        total, effective = float(weights.double().sum()), effective_tokens(weights)
        prior = PRIOR_SHARE * width
        shrunk = InputStatistics(moment / total, effective).shrunk(self.down, prior)
        # The prior adds moments of the original, for which the difference is zero.
        share = effective / (effective + prior)
        return shrunk, DownCorrection.solve(difference * (share / total), shrunk.hessian)


def rows_at_once(width: int) -> int:
    """Return the rows of gate and up in a slice: whole blocks of `width` columns of down."""
    return width * max(1, ROWS_AT_ONCE // width)
