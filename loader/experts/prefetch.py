"""Guesses which experts the next layer will ask for, and rests where guessing costs more than it
brings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.reading.reader import PIECE_BYTES
from loader.experts.stats import LayerStats

TRIAL_GUESSES = 32
"""A layer's guesses after which gain and loss are compared."""
REST_TOKENS = 64
"""Tokens for which a layer is not guessed after a trial that did not pay."""


class Prefetcher:
    """The next layer's router on this layer's router input, as in arXiv 2312.17238, section 3.2,
    but normed with the next layer's weight, which predicts a little better
    (examples/tiny-mixtral/README.md).

    A right guess gains what had been read of it when it was asked for. A wrong one costs, where a
    read on demand comes meanwhile, the rest of the piece that is being read. Whether it pays
    differs by layer: the first ones are hard to guess (docs/traces.md).

    Routers and norms are those at loading. After these, or the routers' top_k, were changed,
    guesses are poorer, and no result is another one.
    """

    def __init__(self, routers: Sequence[Tensor], norms: Sequence[Tensor], guesses: int) -> None:
        """routers [experts, hidden] and norms [hidden] of each layer; `guesses` experts for one
        token.
        """
        self.guesses = guesses
        self._routers = [
            _renormed(*layer) for layer in zip(routers[1:], norms[1:], norms[:-1], strict=True)
        ]
        self._rest = [0] * len(routers)
        self._trial_begin = [LayerStats()] * len(routers)

    def router(self, layer: int) -> Tensor | None:
        """What ranks the experts of layer + 1, [experts, hidden], of which the `guesses` first are
        worth reading; asked for once a token. None at rest.
        """
        if self._rest[layer + 1]:
            self._rest[layer + 1] -= 1
            return None
        return self._routers[layer]

    def weigh(self, layers: Sequence[LayerStats]) -> None:
        """Compares gain and loss of each layer that has had TRIAL_GUESSES since the last time."""
        for number, now in enumerate(layers):
            before = self._trial_begin[number]
            guesses = now.guesses - before.guesses
            if 0 <= guesses < TRIAL_GUESSES:
                continue
            # At a random moment half of a piece is left, while two reads share the disk.
            loss = (now.delays - before.delays) * PIECE_BYTES // 2
            # Less than none: the counters were reset.
            if guesses > 0 and now.early_bytes - before.early_bytes <= loss:
                self._rest[number] = REST_TOKENS
            self._trial_begin[number] = now


def ranked(router: Tensor, x: Tensor, count: int) -> Tensor:
    """For each token of x [T, hidden] the `count` experts that router [experts, hidden] puts first,
    best first: int64 [T, count], where x is.
    """
    return (x.to(router.dtype) @ router.T).topk(count).indices


def in_order(ahead: Tensor) -> list[int]:
    """What to read first, of `ranked`, on the CPU: the likeliest, or with several tokens what most
    of them need.
    """
    if len(ahead) == 1:
        return ahead[0].tolist()  # type: ignore[no-any-return]
    used = torch.bincount(ahead.flatten())
    return used.argsort(descending=True, stable=True)[: int((used > 0).sum())].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def _renormed(router: Tensor, norm: Tensor, norm_before: Tensor) -> Tensor:
    """`router` of a layer for what the norm of the layer before made."""
    ratio = torch.where(norm_before == 0, 0.0, norm.float() / norm_before.float())
    return (router.float() * ratio).to(router.dtype)
