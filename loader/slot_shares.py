"""How many slots each layer gets, chosen from a trace: layers differ in locality, so equal shares waste some."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from loader.policy import Policy
from loader.replay import replay_layer
from loader.trace import Trace


def choose_slots(trace: Trace, total: int, policies: Sequence[Callable[[], Policy]]) -> list[int]:
    """Slots of each layer, `total` in all, that read the least bytes for the decoded tokens of `trace` under
    `policies`, one a layer; each layer has at least num_experts_per_tok and at most all experts.

    ValueError if `total` cannot be divided so.
    """
    return least_cost_slots(miss_bytes(trace, policies), total)


def miss_bytes(trace: Trace, policies: Sequence[Callable[[], Policy]]) -> list[dict[int, int]]:
    """For each layer: slots -> bytes missed by the decoded tokens, for every possible number of slots."""
    architecture = trace.header.architecture
    possible = range(architecture.num_experts_per_tok, architecture.num_local_experts + 1)
    return [
        {slots: size * int(replay_layer(trace, layer, slots, policy).missed.sum()) for slots in possible}
        for layer, (policy, size) in enumerate(zip(policies, trace.header.expert_bytes, strict=True))
    ]


def least_cost_slots(costs: Sequence[dict[int, int]], total: int) -> list[int]:
    """For each layer a key of its `costs` (slots -> cost), `total` in all, with the least sum of costs: exact, whatever
    the curves' shapes. ValueError if there is none."""
    # best[n]: the least cost of the layers so far with n slots in all.
    best: NDArray[np.float64] = np.full(total + 1, np.inf)
    best[0] = 0
    taken: list[NDArray[np.int64]] = []
    for cost in costs:
        candidate, choice = np.full(total + 1, np.inf), np.zeros(total + 1, np.int64)
        for slots, value in cost.items():
            if slots > total:
                continue
            shifted = best[: total + 1 - slots] + value
            better = shifted < candidate[slots:]
            candidate[slots:][better] = shifted[better]
            choice[slots:][better] = slots
        best = candidate
        taken.append(choice)
    if not np.isfinite(best[total]):
        raise ValueError(f"{total} slots cannot be divided among {len(costs)} layers")
    chosen: list[int] = []
    for choice in reversed(taken):
        chosen.append(int(choice[total]))
        total -= chosen[-1]
    return chosen[::-1]
