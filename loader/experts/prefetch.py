"""Guesses which experts the next layer will request, and pauses where guessing does not pay."""

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.reading.reader import STEP_BYTES
from loader.experts.stats import LayerStats

TRIAL_GUESSES = 32
"""Guesses of a layer after which gain and loss are compared."""
REST_TOKENS = 64
"""Tokens for which a layer is not guessed after guesses that did not pay."""


class Prefetcher:
    """Guesses with the next layer's router on this layer's router input (arXiv 2312.17238, 3.2).

    The input is normed with the next layer's weight, which predicts a little better
    (examples/tiny-mixtral/README.md).

    A right guess gains the bytes that were read before the request. A wrong guess delays a demand
    read that comes meanwhile, until its piece is read. Whether guessing pays depends on the layer:
    the first layers are hard to guess (docs/traces.md).

    Routers and norms are those at loading. If they change later, guesses become worse, but results
    stay the same.
    """

    def __init__(self, routers: Sequence[Tensor], norms: Sequence[Tensor], guesses: int) -> None:
        """Prepare the ranking matrices.

        routers: [experts, hidden] of each layer. norms: weight [hidden] of the norm before each
        router. guesses: experts to guess for one token.
        """
        self.guesses = guesses
        self._routers = [
            _renormed(*layer) for layer in zip(routers[1:], norms[1:], norms[:-1], strict=True)
        ]
        self._rest = [0] * len(routers)
        self._trial_begin = [LayerStats()] * len(routers)

    def router(self, layer: int) -> Tensor | None:
        """Return the matrix that ranks the experts of layer + 1, [experts, hidden].

        None while the layer pauses. Called once a token.
        """
        if self._rest[layer + 1]:
            self._rest[layer + 1] -= 1
            return None
        return self._routers[layer]

    def weigh(self, layers: Sequence[LayerStats]) -> None:
        """Compare gain and loss of each layer that made TRIAL_GUESSES since the last comparison."""
        for number, now in enumerate(layers):
            before = self._trial_begin[number]
            guesses = now.guesses - before.guesses
            if 0 <= guesses < TRIAL_GUESSES:
                continue
            # A demand read meets on average half a piece, and shares the disk with it.
            loss = (now.delays - before.delays) * STEP_BYTES // 2
            # A negative count means that the counters were reset.
            if guesses > 0 and now.early_bytes - before.early_bytes <= loss:
                self._rest[number] = REST_TOKENS
            self._trial_begin[number] = now


def ranked(router: Tensor, x: Tensor, count: int) -> Tensor:
    """Return each token's `count` best experts, best first: int64 [T, count] on x's device.

    router: [experts, hidden]. x: [T, hidden].
    """
    return (x.to(router.dtype) @ router.T).topk(count).indices


def in_order(ahead: Tensor) -> list[int]:
    """Return the experts to prefetch, first ones first, from the result of `ranked` on the CPU.

    One token: best first. Several tokens: experts that most tokens need first.
    """
    if len(ahead) == 1:
        return ahead[0].tolist()  # type: ignore[no-any-return]
    used = torch.bincount(ahead.flatten())
    return used.argsort(descending=True, stable=True)[: int((used > 0).sum())].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def _renormed(router: Tensor, norm: Tensor, norm_before: Tensor) -> Tensor:
    """Return a router [experts, hidden] for input normed with `norm_before` instead of `norm`."""
    ratio = torch.where(norm_before == 0, 0.0, norm.float() / norm_before.float())
    return (router.float() * ratio).to(router.dtype)
