from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from made_traces import random_experts, trace_of

from formats.errors import RecipeError
from loader.experts.policy import LruPolicy
from loader.traces.replay import replay_layer
from loader.traces.slot_shares import least_cost_slots, miss_bytes, slots_from_trace


@pytest.mark.parametrize("seed", range(10))
def test_slots_cost_as_little_as_any_division(seed):
    generator = np.random.default_rng(seed)
    # Not even falling: the choice must not rely on convex curves.
    costs = [{n: int(generator.integers(100)) for n in range(2, 6)} for _ in range(4)]
    for total in range(8, 21):
        best = min(
            sum(c[n] for c, n in zip(costs, shares, strict=True))
            for shares in product(range(2, 6), repeat=4)
            if sum(shares) == total
        )
        found = least_cost_slots(costs, total)
        assert sum(found) == total
        assert sum(c[n] for c, n in zip(costs, found, strict=True)) == best


@pytest.mark.parametrize("total", [7, 21])
def test_a_total_that_cannot_be_divided_is_an_error(total):
    with pytest.raises(ValueError, match=f"{total} slots cannot be divided among 4 layers"):
        least_cost_slots([dict.fromkeys(range(2, 6), 0)] * 4, total)


def test_layers_of_little_locality_and_large_experts_get_more():
    even, skewed = (
        random_experts(0, 300, layers=1, skew=0),
        random_experts(1, 300, layers=2, skew=3),
    )
    experts = np.concatenate([even, skewed], axis=1)
    policies = [LruPolicy] * 3
    trace = trace_of(experts, expert_bytes=[100, 100, 100])
    first, second, third = least_cost_slots(miss_bytes(trace, policies), 12)
    assert first > max(second, third) and min(second, third) >= 1
    larger = least_cost_slots(
        miss_bytes(trace_of(experts, expert_bytes=[1, 1, 10000]), policies), 12
    )
    assert larger[2] == 8


def test_chosen_slots_read_no_more_than_equal_ones():
    trace = trace_of(random_experts(2, 400, layers=4, skew=np.array([0, 1, 2, 3])[:, None]))
    shares = least_cost_slots(miss_bytes(trace, [LruPolicy] * 4), 16)

    def misses(slots):
        return sum(
            replay_layer(trace, layer, n, LruPolicy).missed.sum() for layer, n in enumerate(slots)
        )

    assert misses(shares) < misses([4] * 4)


def folder_of(trace, sizes):
    """Return a stand-in for a folder in slots_from_trace. sizes: bytes of an expert, by layer."""
    a = trace.header.architecture
    layers = [
        SimpleNamespace(experts=[SimpleNamespace(codec="none")] * a.num_local_experts)
        for _ in sizes
    ]
    return SimpleNamespace(
        folder="made",
        architecture=a,
        index=SimpleNamespace(layers=layers),
        layout=lambda layer, expert: SimpleNamespace(n_bytes=sizes[layer]),
    )


def test_a_trace_divides_what_the_budget_holds():
    trace = trace_of(
        random_experts(2, 400, layers=4, skew=np.array([0, 1, 2, 3])[:, None]),
        expert_bytes=[100] * 4,
    )
    folder = folder_of(trace, [100] * 4)
    found = slots_from_trace(trace, folder, 2 * 100 + 4 * 400 + 50, LruPolicy)
    assert found == least_cost_slots(miss_bytes(trace, [LruPolicy] * 4), 16)
    assert slots_from_trace(trace, folder, 8 * 400, LruPolicy) == [8] * 4
    assert slots_from_trace(trace, folder, 200, LruPolicy) == [0] * 4


def test_the_division_takes_no_more_than_equal_slots_where_experts_have_several_sizes():
    sizes = [1000, 10, 10, 10]
    trace = trace_of(
        random_experts(2, 400, layers=4, skew=np.array([0, 3, 3, 3])[:, None]), expert_bytes=sizes
    )
    found = slots_from_trace(trace, folder_of(trace, sizes), 2 * 1010 + 4 * 1030, LruPolicy)
    assert sum(n * size for n, size in zip(found, sizes, strict=True)) <= 4 * 1030


def test_a_trace_of_another_model_divides_nothing():
    trace = trace_of(random_experts(0, 9, layers=2))
    with pytest.raises(RecipeError, match="another model"):
        slots_from_trace(
            trace, folder_of(trace_of(random_experts(0, 9, layers=3)), [1] * 3), 1000, LruPolicy
        )
