"""Second moments of a linear layer's inputs: calibration sums them, calibrated solvers use them."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

HESSIAN_DAMPING = 0.01
"""Share of the mean diagonal that factorizations add to the diagonal of H (docs/quality.md)."""


class InputStatistics:
    """H = Σ w·x·xᵀ / Σ w over the tokens that reached a linear layer, in blocks of columns.

    hessian: float32 [blocks, width, width], the diagonal blocks of H; a single block is the whole
    matrix. Columns beyond the layer's last are zero. tokens: number of tokens summed, an effective
    number if their weights differ.
    """

    def __init__(self, hessian: Tensor, tokens: float) -> None:
        self.hessian = hessian
        self.tokens = tokens
        self._lock = threading.Lock()
        self._derived: dict[Any, Any] = {}

    def derived(self, key: Any, make: Callable[[], T]) -> T:
        """Return the result of `make`, computed once per key, such as a factorization.

        All solves that share these statistics get the same object.
        """
        with self._lock:
            if key not in self._derived:
                self._derived[key] = make()
            result: T = self._derived[key]
            return result

    def shrunk(self, towards: "InputStatistics", prior_tokens: float) -> "InputStatistics":
        """Return these statistics as if `prior_tokens` more tokens had the moments of `towards`."""
        if not self.tokens:
            return InputStatistics(towards.hessian, towards.tokens)
        share = self.tokens / (self.tokens + prior_tokens)
        return InputStatistics(torch.lerp(towards.hessian, self.hessian, share), self.tokens)
