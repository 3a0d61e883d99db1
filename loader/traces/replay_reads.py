"""What a replayed cache reads, with and without guesses, and how many tokens a second a disk or
link allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader.traces.replay import LayerReplay, decoded_tokens, uses_guess
from loader.traces.trace import Trace


@dataclass(frozen=True)
class Reads:
    """Bytes read for each decoded token and layer, int64 [decoded tokens, layers] each.

    demand: experts that were neither in a slot nor guessed. useful: guessed, and used. wasted:
    guessed in vain.
    """

    demand: NDArray[np.int64]
    useful: NDArray[np.int64]
    wasted: NDArray[np.int64]

    @property
    def covered(self) -> float:
        """The share of the bytes that missed the cache which guesses had on the way; 0.0 where
        nothing missed.
        """
        missed = int(self.demand.sum() + self.useful.sum())
        return int(self.useful.sum()) / missed if missed else 0.0

    def bytes_per_token(self) -> tuple[float, float, float]:
        """(demand, useful, wasted) bytes a token, over all layers."""
        tokens = max(1, len(self.demand))
        return tuple(float(part.sum()) / tokens for part in (self.demand, self.useful, self.wasted))  # type: ignore[return-value]

    def tokens_per_s(self, bytes_per_s: float, compute_s: float = 0.0) -> float:
        """Tokens a second over a disk or link that carries `bytes_per_s`, where a layer computes
        for `compute_s`; inf where nothing takes time.

        A layer waits for its demand reads; while it computes, the next layer's guesses are read,
        wasted ones to their end too. So a token takes the sum over layers of demand / bytes_per_s +
        max(compute_s, the next layer's guesses / bytes_per_s). With compute_s = 0 that is all bytes
        over the speed: guesses can then only cost.
        """
        ahead = np.zeros(self.demand.shape)
        ahead[:, :-1] = (self.useful + self.wasted)[:, 1:] / bytes_per_s
        total_s = float(self.demand.sum() / bytes_per_s + np.maximum(compute_s, ahead).sum())
        return len(self.demand) / total_s if total_s else float("inf")


def reads_of(
    trace: Trace, layers: Sequence[LayerReplay], guesses: int, *, next_norm: bool = True
) -> Reads:
    """The reads of `trace` over the replayed `layers`.

    At each layer, of the best `guesses` (0 for no prefetch) for the next one, those are read that
    are not in its slots. A guess enters a slot only when it is used, so hits and misses are those
    of the replay. `next_norm` takes `trace.guesses_next_norm`.

    Of decoded tokens; prompts read layer by layer and need no guesses. ValueError if the trace has
    fewer guesses.
    """
    if not 0 <= guesses <= trace.header.guesses:
        raise ValueError(f"{guesses} guesses: the trace has {trace.header.guesses} a layer")
    named = trace.guesses_next_norm if next_norm else trace.guesses
    decoded = decoded_tokens(trace)
    shape = int(decoded.sum()), len(layers)
    missed, useful, wasted = (np.zeros(shape, np.int64) for _ in range(3))
    for number, layer in enumerate(layers):
        missed[:, number] = layer.missed[decoded].sum(1)
        if number and guesses:
            best = named[:, number - 1, :guesses]
            issued = ~np.take_along_axis(layer.resident, best.astype(np.int64), 1)
            used = uses_guess(trace, number, best)
            useful[:, number] = (issued & used)[decoded].sum(1)
            wasted[:, number] = (issued & ~used)[decoded].sum(1)
    sizes = np.array(trace.header.expert_bytes, np.int64)
    return Reads((missed - useful) * sizes, useful * sizes, wasted * sizes)
