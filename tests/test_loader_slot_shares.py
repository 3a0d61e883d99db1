from itertools import product

import numpy as np
import pytest
from made_traces import random_experts, trace_of

from loader.policy import LruPolicy
from loader.replay import replay_layer
from loader.slot_shares import choose_slots, least_cost_slots


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
    even, skewed = random_experts(0, 300, layers=1, skew=0), random_experts(1, 300, layers=2, skew=3)
    experts = np.concatenate([even, skewed], axis=1)
    policies = [LruPolicy] * 3
    trace = trace_of(experts, expert_bytes=[100, 100, 100])
    first, second, third = choose_slots(trace, 12, policies)
    assert first > max(second, third) and min(second, third) >= 2
    larger = choose_slots(trace_of(experts, expert_bytes=[1, 1, 10000]), 12, policies)
    assert larger[2] == 8


def test_chosen_slots_read_no_more_than_equal_ones():
    trace = trace_of(random_experts(2, 400, layers=4, skew=np.array([0, 1, 2, 3])[:, None]))
    shares = choose_slots(trace, 16, [LruPolicy] * 4)

    def misses(slots):
        return sum(replay_layer(trace, layer, n, LruPolicy).missed.sum() for layer, n in enumerate(slots))

    assert misses(shares) < misses([4] * 4)
