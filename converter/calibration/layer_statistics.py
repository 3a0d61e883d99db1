"""What calibration knows of one layer: its linears' statistics, some computed when an expert's turn
comes.
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
"""Columns of a block of down's statistics, if nothing else is asked for; full width takes 822 MB an
expert of 8x7B.
"""
PRIOR_SHARE = 0.25
"""An expert's statistics are shrunk towards its layer's by this many tokens per column of a block.
"""

Rows = Callable[[int, int], Tensor]
"""Rows begin..end (exclusive) of a matrix."""


@dataclass(frozen=True)
class ExpertInputs:
    """What reached one expert: which tokens (int64 [n]), and its down inputs, bfloat16 [n,
    intermediate].
    """

    tokens: Tensor
    inner: Tensor


def _nothing() -> InputStatistics:
    return InputStatistics(torch.empty(0, 0, 0), 0.0)


@dataclass(frozen=True)
class LayerStatistics:
    """linears: of the packable linears, by module path. The rest is of the experts, and empty in a
    layer without any.

    inputs: float32 [tokens, hidden], the experts'; weights: float32 [tokens]. gate_up and down are
    of all experts together. products: the dtype in which weights are multiplied.
    """

    linears: dict[str, InputStatistics]
    inputs: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    experts: list[ExpertInputs] = field(default_factory=list)
    gate_up: InputStatistics = field(default_factory=_nothing)
    down: InputStatistics = field(default_factory=_nothing)
    products: torch.dtype = torch.float32

    def gate_up_statistics(self, expert: int) -> tuple[InputStatistics, int]:
        """Of an expert's gate and up, and how many tokens reached it."""
        tokens = self.experts[expert].tokens
        weights = self.weights[tokens]
        if not len(weights):
            return self.gate_up, 0
        moment = second_moment([self.inputs[tokens]], weights, one_by_one) / float(
            weights.double().sum()
        )
        own = InputStatistics(moment[None], effective_tokens(weights))
        return own.shrunk(self.gate_up, PRIOR_SHARE * moment.shape[0]), len(weights)

    def down_statistics(
        self, expert: int, gate: Rows, up: Rows
    ) -> tuple[InputStatistics, DownCorrection | None]:
        """Of an expert's down, given its quantized gate and up, and how to correct its weights for
        their errors.
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
            found = inner_activations(
                x, gate(begin, end).to(self.products), up(begin, end).to(self.products)
            )
            missing = reached.inner[:, begin:end].float() - found
            blocks = slice(begin // width, -(-end // width))
            moment[blocks] = block_moments(found, weights, width)
            difference[blocks] = block_moments(missing, weights, width, found)
        total, effective = float(weights.double().sum()), effective_tokens(weights)
        prior = PRIOR_SHARE * width
        shrunk = InputStatistics(moment / total, effective).shrunk(self.down, prior)
        # The layer's moments are those of the original, which lacks nothing.
        share = effective / (effective + prior)
        return shrunk, DownCorrection.solve(difference * (share / total), shrunk.hessian)


def rows_at_once(width: int) -> int:
    """How many rows of gate and up are used at once: whole blocks of `width` columns of down."""
    return width * max(1, ROWS_AT_ONCE // width)
