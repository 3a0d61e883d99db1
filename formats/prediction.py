"""What a model predicts for one window of text: the input of a comparison of two models."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Logits and routing of one window.

    logits: (begin, end) -> float32 [end - begin, vocabulary] of these positions.
    routers: experts that the routers chose, by rank: int64 [layers with experts, window, k].
    """

    logits: Callable[[int, int], Tensor]
    routers: Tensor
