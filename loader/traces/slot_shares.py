"""Chooses each layer's slots from a trace. Layers differ in locality, so equal slots waste some."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from formats.artifact import Artifact
from formats.errors import RecipeError
from loader.budget.expert_sizes import expert_bytes_by_layer
from loader.budget.slot_counts import slots_of_folder
from loader.experts.policy import Policy
from loader.traces.replay import replay_layer
from loader.traces.trace import Trace


def slots_from_trace(
    trace: Trace,
    artifact: Artifact,
    budget_bytes: int,
    policy: Callable[[], Policy],
    *,
    io: str = "auto",
) -> list[int]:
    """Return the slots of each layer that minimize the bytes that `trace` reads.

    The total is that of evenly spread slots in `budget_bytes`, or less if layers with larger
    experts get more slots. policy: makes a layer's eviction policy. io: see `slots_of_folder`.
    Raises RecipeError if the trace is of another model, and the errors of `slots_by_layer`.
    """
    # The traced routers may have chosen another number of experts.
    traced = msgspec.structs.replace(
        trace.header.architecture, num_experts_per_tok=artifact.architecture.num_experts_per_tok
    )
    if traced != artifact.architecture:
        raise RecipeError(
            f"the trace is of another model than {artifact.folder}",
            "trace this model, or its original",
        )
    sizes = expert_bytes_by_layer(artifact)

    def size_of(slots: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(slots, sizes, strict=True))

    even = slots_of_folder(artifact, budget_bytes, io)
    costs = miss_bytes(trace, [policy] * len(even))
    possible = (least_cost_slots(costs, total) for total in range(sum(even), -1, -1))
    return next(slots for slots in possible if size_of(slots) <= size_of(even))


def miss_bytes(trace: Trace, policies: Sequence[Callable[[], Policy]]) -> list[dict[int, int]]:
    """Return the bytes that decoded tokens miss in each layer, for 0 slots to all experts.

    The result has a dict for each layer: slots -> bytes.
    """
    possible = range(trace.header.architecture.num_local_experts + 1)
    return [
        {
            slots: size * int(replay_layer(trace, layer, slots, policy).missed.sum())
            for slots in possible
        }
        for layer, (policy, size) in enumerate(
            zip(policies, trace.header.expert_bytes, strict=True)
        )
    ]


def least_cost_slots(costs: Sequence[dict[int, int]], total: int) -> list[int]:
    """Return the slots of each layer, `total` in sum, with the smallest sum of costs.

    costs: slots -> cost, for each layer. The result is exact (dynamic programming). Raises
    ValueError if no choice has the sum `total`.
    """
    # best[n]: smallest cost of the layers so far with n slots in sum.
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
