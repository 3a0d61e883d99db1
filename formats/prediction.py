"""A model's prediction for one window of text: the input of a comparison of two models."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Logits and routing of one window of tokens."""

    logits: Callable[[int, int], Tensor]
    """logits(begin, end) -> float32 [end - begin, vocabulary], for these positions."""
    routers: Tensor
    """Experts chosen by each router, best first: int64 [layers with experts, window, k]."""
