import numpy as np
import pytest
from made_traces import random_experts, trace_of

from loader.experts.policy import LruPolicy
from loader.traces.replay import decoded_tokens, replay_layer
from loader.traces.replay_reads import Reads, reads_of


def replayed(trace, slots):
    return [replay_layer(trace, layer, slots, LruPolicy) for layer in range(trace.experts.shape[1])]


def test_a_guess_is_read_only_if_it_is_not_in_a_slot():
    # Layer 1 holds 2 and 3 after the first token. The second token's guesses: 2 is there, 5 is
    # right, 6 is wrong.
    trace = trace_of(
        [[[0, 1], [2, 3]], [[0, 1], [2, 5]]],
        guesses=[[[7, 6, 1]], [[2, 5, 6]]],
        expert_bytes=[10, 100],
    )
    reads = reads_of(trace, replayed(trace, 4), 3, next_norm=False)
    assert reads.demand.tolist() == [[20, 200], [0, 0]]
    assert reads.useful.tolist() == [[0, 0], [0, 100]]
    assert reads.wasted.tolist() == [[0, 300], [0, 100]]
    assert reads.covered == 100 / 320
    assert reads.bytes_per_token() == (110, 50, 200)


def test_only_the_best_guesses_are_read_and_the_norm_is_chosen():
    trace = trace_of([[[0, 1], [2, 3]]], guesses=[[[2, 7, 6, 3]]])
    layers = replayed(trace, 4)
    found = {n: reads_of(trace, layers, n, next_norm=False).useful.sum() for n in range(5)}
    assert found == {0: 0, 1: 1000, 2: 1000, 3: 1000, 4: 2000}
    # The other array holds the same guesses in reverse.
    assert reads_of(trace, layers, 1, next_norm=True).useful.sum() == 1000
    assert reads_of(trace, layers, 3, next_norm=True).wasted.sum() == 2000


@pytest.mark.parametrize("guesses", range(5))
def test_demand_and_useful_bytes_are_the_misses_whatever_is_guessed(guesses):
    experts = random_experts(5, 200, layers=3)
    named = random_experts(6, 200, layers=2, chosen=4)
    trace = trace_of(
        experts, guesses=named, prompts=[(50, 20), (150, 0)], expert_bytes=[1, 10, 100]
    )
    layers = replayed(trace, 4)
    reads = reads_of(trace, layers, guesses)
    missed = np.stack([layer.missed.sum(1) for layer in layers], 1) * [1, 10, 100]
    np.testing.assert_array_equal(reads.demand + reads.useful, missed[decoded_tokens(trace)])
    assert not reads.useful[:, 0].any() and not reads.wasted[:, 0].any()


def test_more_guesses_than_the_trace_has_are_an_error():
    trace = trace_of(random_experts(0, 3, layers=2))
    with pytest.raises(ValueError, match="5 guesses: the trace has 4"):
        reads_of(trace, replayed(trace, 4), 5)


def test_a_layer_waits_for_demand_and_hides_guesses_behind_its_computing():
    # Two tokens, three layers; 100 bytes a second; a layer computes for 2 s.
    demand = np.array([[100, 0, 300], [0, 0, 0]])
    useful = np.array([[0, 100, 0], [0, 300, 0]])
    wasted = np.array([[0, 0, 500], [0, 0, 0]])
    reads = Reads(demand, useful, wasted)
    # 1 + max(2, 1) + max(2, 5) + 3 + 2, then max(2, 3) + 2 + 2
    assert reads.tokens_per_s(100, 2) == pytest.approx(2 / (13 + 7))
    assert reads.tokens_per_s(100) == pytest.approx(2 / 13)
    assert Reads(demand * 0, useful * 0, wasted * 0).tokens_per_s(100) == float("inf")
