"""How many slots each layer gets, chosen from a trace: layers differ in locality, so equal shares
waste some.
"""

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
    """Slots of each layer for from_pretrained: as many in all as `budget_bytes` hold when they are
    spread evenly (fewer where those of larger experts would take more), divided as `trace` would
    have read least.

    RecipeError if the trace is of another model; DoesNotFitError as `slots_by_layer`.
    """
    # The routers may be set to another number of experts since.
    traced = msgspec.structs.replace(
        trace.header.architecture, num_experts_per_tok=artifact.architecture.num_experts_per_tok
    )
    if traced != artifact.architecture:
        raise RecipeError(
            f"a trace of another model than {artifact.folder}", "trace this one, or its original"
        )
    sizes = expert_bytes_by_layer(artifact)

    def taken(slots: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(slots, sizes, strict=True))

    even = slots_of_folder(artifact, budget_bytes, io)
    costs = miss_bytes(trace, [policy] * len(even))
    possible = (least_cost_slots(costs, total) for total in range(sum(even), -1, -1))
    return next(slots for slots in possible if taken(slots) <= taken(even))


def miss_bytes(trace: Trace, policies: Sequence[Callable[[], Policy]]) -> list[dict[int, int]]:
    """For each layer: slots -> bytes missed by the decoded tokens, for every possible number of
    slots, 0 included.
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
    """For each layer a key of its `costs` (slots -> cost), `total` in all, with the least sum of
    costs: exact, whatever the curves' shapes. ValueError if there is none.
    """
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
