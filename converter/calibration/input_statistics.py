"""Second moments of a linear's inputs: what calibration gathers and the feedback solver minimizes
errors under.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from converter.forward.ordered_tasks import RunAll

T = TypeVar("T")
STRIPE_COLUMNS = 1024
"""Columns of a moment that one task sums. Fixed, so that the number of workers changes no bit of a
sum.
"""


class InputStatistics:
    """H = Σ w·x·xᵀ / Σ w over the tokens that reached a linear, in blocks along its columns.

    hessian: float32 [blocks, width, width], the blocks of the diagonal; one block is the whole
    matrix. Columns past the linear's last are zero. tokens: how many tokens were summed (an
    effective number where their weights differ).
    """

    def __init__(self, hessian: Tensor, tokens: float) -> None:
        self.hessian = hessian
        self.tokens = tokens
        self._lock = threading.Lock()
        self._derived: dict[Any, Any] = {}

    def derived(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all solves that share these statistics: a factorization."""
        with self._lock:
            if key not in self._derived:
                self._derived[key] = make()
            result: T = self._derived[key]
            return result

    def shrunk(self, towards: "InputStatistics", prior_tokens: float) -> "InputStatistics":
        """These, as if `prior_tokens` more tokens with the moments of `towards` had been seen."""
        if not self.tokens:
            return InputStatistics(towards.hessian, towards.tokens)
        share = self.tokens / (self.tokens + prior_tokens)
        return InputStatistics(torch.lerp(towards.hessian, self.hessian, share), self.tokens)


def second_moment(parts: Sequence[Tensor], weights: Tensor, run_all: RunAll) -> Tensor:
    """Σ w·x·xᵀ, float32 [columns, columns], of the rows x of all parts, [n, columns] each. weights:
    [all rows].

    All are float32. Parts are summed in their order.
    """
    columns = parts[0].shape[1]
    result = torch.zeros(columns, columns)
    starts = range(0, columns, STRIPE_COLUMNS)
    for x, w in zip(parts, torch.split(weights, [len(part) for part in parts]), strict=True):
        weighted = x * w[:, None]

        def add(row: int, column: int, x: Tensor = x, weighted: Tensor = weighted) -> None:
            rows, across = slice(row, row + STRIPE_COLUMNS), slice(column, column + STRIPE_COLUMNS)
            result[rows, across].addmm_(weighted[:, rows].T, x[:, across])

        run_all([partial(add, r, c) for r in starts for c in starts if c <= r])
    for row in starts:
        for column in range(0, row, STRIPE_COLUMNS):
            rows, across = slice(row, row + STRIPE_COLUMNS), slice(column, column + STRIPE_COLUMNS)
            result[across, rows] = result[rows, across].T
    return result


def block_moments(x: Tensor, weights: Tensor, width: int, other: Tensor | None = None) -> Tensor:
    """As `second_moment`, but only blocks of `width` columns: float32 [ceil(columns / width),
    width, width].

    With `other`, of the shape of x, Σ w·x·otherᵀ.
    """
    tokens, columns = x.shape
    blocks = -(-columns // width)

    def in_blocks(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, blocks * width - columns))
        return padded.view(tokens, blocks, width).transpose(0, 1)

    own = in_blocks(x)
    return torch.bmm(
        (own * weights[:, None]).transpose(1, 2), own if other is None else in_blocks(other)
    )


def effective_tokens(weights: Tensor) -> float:
    """(Σ w)² / Σ w²: the number of tokens where all weigh the same."""
    squares = float(weights.double().square().sum())
    return float(weights.double().sum()) ** 2 / squares if squares else 0.0
