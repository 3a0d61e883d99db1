"""The bytes that a replayed cache reads, and the tokens per second that a disk or link allows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader.traces.replay import LayerReplay, decoded_tokens, uses_guess
from loader.traces.trace import Trace


@dataclass(frozen=True)
class Reads:
    """Bytes read for each decoded token and layer; each field is int64 [decoded tokens, layers].

    demand: experts without a slot that were not guessed. useful: guessed experts that were used.
    wasted: guessed experts that were not used.
    """

    demand: NDArray[np.int64]
    useful: NDArray[np.int64]
    wasted: NDArray[np.int64]

    @property
    def covered(self) -> float:
        """Share of the missed bytes that guesses read ahead; 0.0 without misses."""
        missed = int(self.demand.sum() + self.useful.sum())
        return int(self.useful.sum()) / missed if missed else 0.0

    def bytes_per_token(self) -> tuple[float, float, float]:
        """Return (demand, useful, wasted) bytes per token, summed over all layers."""
        tokens = max(1, len(self.demand))
        return tuple(float(part.sum()) / tokens for part in (self.demand, self.useful, self.wasted))  # type: ignore[return-value]

    def tokens_per_s(self, bytes_per_s: float, compute_s: float = 0.0) -> float:
        """Return the tokens per second that a disk or link of `bytes_per_s` allows.

        compute_s: seconds that a layer computes. The result is inf if nothing takes time.

        A layer waits for its demand reads. While it computes, all guesses for the next layer are
        read, also the wrong ones. So a token takes the sum over layers of demand / bytes_per_s +
        max(compute_s, next layer's guesses / bytes_per_s). With compute_s = 0 a guess never helps.
        """
        ahead = np.zeros(self.demand.shape)
        ahead[:, :-1] = (self.useful + self.wasted)[:, 1:] / bytes_per_s
        total_s = float(self.demand.sum() / bytes_per_s + np.maximum(compute_s, ahead).sum())
        return len(self.demand) / total_s if total_s else float("inf")


def reads_of(
    trace: Trace, layers: Sequence[LayerReplay], guesses: int, *, next_norm: bool = True
) -> Reads:
    """Return the reads of a trace's decoded tokens; prompts need no guesses.

    layers: the replay of each layer. guesses: how many of the best guesses are prefetched if they
    have no slot; 0 for no prefetch. A guess gets a slot only when it is used, so hits and misses
    are those of the replay. next_norm: True uses `trace.guesses_next_norm`.

    Raises ValueError if the trace has fewer guesses.
    """
    if not 0 <= guesses <= trace.header.guesses:
        raise ValueError(f"{guesses} guesses: the trace has {trace.header.guesses} for each layer")
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
