"""Sums of second moments, in an order that does not depend on the number of workers."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from converter.forward.ordered_tasks import RunAll

STRIPE_COLUMNS = 1024
"""Columns of a moment that one task sums. A fixed size: the workers' number changes no bit."""


def second_moment(parts: Sequence[Tensor], weights: Tensor, run_all: RunAll) -> Tensor:
    """Return Σ w·x·xᵀ over the rows x of all parts, float32 [columns, columns].

    parts: float32 [n, columns] each, summed in this order. weights: float32 [all rows].
    """
    columns = parts[0].shape[1]
    result = torch.zeros(columns, columns)
    starts = range(0, columns, STRIPE_COLUMNS)
    for x, w in zip(parts, torch.split(weights, [len(part) for part in parts]), strict=True):
        run_all(_stripe_tasks(result, x, x * w[:, None]))
    for row in starts:
        for column in range(0, row, STRIPE_COLUMNS):
            rows = slice(row, row + STRIPE_COLUMNS)
            across = slice(column, column + STRIPE_COLUMNS)
            result[across, rows] = result[rows, across].T
    return result


def _stripe_tasks(result: Tensor, x: Tensor, weighted: Tensor) -> list[Callable[[], None]]:
    """Return tasks that add weightedᵀ·x to the lower triangle of `result`, one tile each."""

    def add(row: int, column: int) -> None:
        rows = slice(row, row + STRIPE_COLUMNS)
        across = slice(column, column + STRIPE_COLUMNS)
        result[rows, across].addmm_(weighted[:, rows].T, x[:, across])

    starts = range(0, len(result), STRIPE_COLUMNS)
    return [partial(add, row, column) for row in starts for column in starts if column <= row]


def block_moments(x: Tensor, weights: Tensor, width: int, other: Tensor | None = None) -> Tensor:
    """Return the diagonal blocks of Σ w·x·xᵀ, float32 [ceil(columns / width), width, width].

    With `other`, of the shape of x, sum w·x·otherᵀ instead.
    """
    tokens, columns = x.shape
    blocks = -(-columns // width)

    def in_blocks(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, blocks * width - columns))
        return padded.view(tokens, blocks, width).transpose(0, 1)

    left = in_blocks(x)
    right = left if other is None else in_blocks(other)
    return torch.bmm((left * weights[:, None]).transpose(1, 2), right)


def effective_tokens(weights: Tensor) -> float:
    """Return (Σ w)² / Σ w²: the number of tokens if all weights are equal."""
    squares = float(weights.double().square().sum())
    return float(weights.double().sum()) ** 2 / squares if squares else 0.0
