"""Guesses which experts the next layer will ask for, and rests where guessing costs more than it brings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.reader import PIECE_BYTES
from loader.stats import LayerStats

TRIAL_GUESSES = 64
"""Guesses after which gain and loss are compared."""
REST_LAYERS = 2000
"""Layers without guesses after a trial that did not pay: some 60 tokens of a model with 32 layers."""


class Prefetcher:
    """The next layer's router on this layer's router input, as in arXiv 2312.17238, section 3.2, but normed with the
    next layer's weight, which predicts a little better (examples/tiny-mixtral/README.md).

    A right guess gains what had been read of it when it was asked for. A wrong one costs, where a read on demand comes
    meanwhile, the rest of the piece that is being read.
    """

    def __init__(self, routers: Sequence[Tensor], norms: Sequence[Tensor], top_k: int, guesses: int) -> None:
        """routers [experts, hidden] and norms [hidden] of each layer; at most `guesses` experts for one token."""
        self._top_k, self._guesses = top_k, guesses
        self._routers = [_renormed(*layer) for layer in zip(routers[1:], norms[1:], norms[:-1], strict=True)]
        self._rest = 0
        self._trial_begin = LayerStats()

    def guess(self, layer: int, x: Tensor) -> list[int]:
        """Experts of layer + 1, the likeliest first, from what the router of `layer` saw, x [T, hidden]; [] at rest."""
        if self._rest:
            self._rest -= 1
            return []
        router = self._routers[layer]
        logits = x.to(router.dtype) @ router.T
        if len(x) == 1:
            return logits[0].topk(self._guesses).indices.tolist()  # type: ignore[no-any-return]
        # The experts of most tokens first.
        chosen = logits.topk(self._top_k, dim=-1).indices.flatten()
        used = torch.bincount(chosen, minlength=len(router))
        return used.argsort(descending=True, stable=True)[: int((used > 0).sum())].tolist()  # type: ignore[no-any-return]

    def weigh(self, total: LayerStats) -> None:
        """Compares gain and loss once there were TRIAL_GUESSES since the last time. `total` is of all layers."""
        before = self._trial_begin
        guesses = total.guesses - before.guesses
        if 0 <= guesses < TRIAL_GUESSES:
            return
        gain = total.early_bytes - before.early_bytes
        # On the mean half of a piece is left, while two reads share the disk.
        loss = (total.delays - before.delays) * PIECE_BYTES // 2
        if guesses > 0 and gain <= loss:
            self._rest = REST_LAYERS
        self._trial_begin = total


def _renormed(router: Tensor, norm: Tensor, norm_before: Tensor) -> Tensor:
    """`router` of a layer for what the norm of the layer before made."""
    ratio = torch.where(norm_before == 0, 0.0, norm.float() / norm_before.float())
    return (router.float() * ratio).to(router.dtype)
