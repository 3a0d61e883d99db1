from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest
import torch
from made_traces import random_experts, trace_of
from measured_texts import trace_texts
from slow_reader import SlowReader

from loader.experts.cache import ExpertCache
from loader.experts.policy import POLICIES, LrfuPolicy, LruPolicy
from loader.hf.loading.plain_checkpoint import load_checkpoint
from loader.model import from_pretrained, load_tokenizer
from loader.traces.record_trace import TracedModel
from loader.traces.replay import Request, decoded_tokens, recall, replay_layer, requests_of
from loader.traces.routing_recorder import RoutingRecorder


def hits_of_a_recency_list(tokens, slots):
    """LRU by examples/tiny-mixtral/README.md, written down independently."""
    recent, hits = [], []
    for experts in tokens:
        hits.append(
            [
                e in recent[len(recent) - slots :] if len(recent) > slots else e in recent
                for e in experts
            ]
        )
        for e in experts:
            recent = [r for r in recent if r != e] + [e]
    return hits


def fewest_misses(tokens, slots):
    """Return the fewest misses over all choices of victims, found by trying them all."""

    @lru_cache(None)
    def least(at, present):
        if at == len(tokens):
            return 0
        asked = frozenset(tokens[at])
        after = present | asked
        misses = len(asked - present)
        if len(after) <= slots:
            return misses + least(at + 1, after)
        return misses + min(least(at + 1, kept) for kept in subsets(after, asked, slots))

    return least(0, frozenset())


def subsets(experts, needed, size):
    """The subsets of `experts` of a size that contain `needed`."""
    rest = sorted(experts - needed)
    return [needed | frozenset(c) for c in combinations(rest, size - len(needed))]


@pytest.mark.parametrize("slots", range(2, 9))
def test_lru_is_a_recency_list(slots):
    trace = trace_of(random_experts(0, 300))
    missed = replay_layer(trace, 0, slots, LruPolicy).missed
    assert (~missed).tolist() == hits_of_a_recency_list(trace.experts[:, 0].tolist(), slots)


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_belady_misses_as_few_as_any_choice_of_evictions(slots, seed):
    trace = trace_of(random_experts(seed, 24, count=6), count=6)
    tokens = tuple(tuple(t) for t in trace.experts[:, 0].tolist())
    assert replay_layer(trace, 0, slots, None).missed.sum() == fewest_misses(tokens, slots)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_policy_beats_belady_and_all_agree_where_nothing_can_be_chosen(policy):
    trace = trace_of(random_experts(7, 500, skew=0.5))
    for slots in range(2, 9):
        found, best = (replay_layer(trace, 0, slots, p).missed.sum() for p in (policy, None))
        assert found >= best
        if slots in (2, 8):
            assert found == best


def test_what_is_resident_is_what_was_used_and_not_given_up():
    trace = trace_of([[[0, 1]], [[2, 0]], [[3, 0]], [[1, 2]]])
    replay = replay_layer(trace, 0, 3, LruPolicy)
    assert [np.flatnonzero(row).tolist() for row in replay.resident] == [
        [],
        [0, 1],
        [0, 1, 2],
        [0, 2, 3],
    ]
    assert replay.missed.tolist() == [[True, True], [True, False], [True, False], [True, False]]


@pytest.mark.parametrize("policy", [*POLICIES.values(), None], ids=[*POLICIES, "belady"])
def test_misses_are_what_was_not_resident(policy):
    trace = trace_of(random_experts(3, 200), prompts=[(50, 20), (150, 100)])
    replay = replay_layer(trace, 0, 4, policy)
    decoded = decoded_tokens(trace)
    present = np.take_along_axis(replay.resident, trace.experts[:, 0].astype(int), 1)
    np.testing.assert_array_equal(replay.missed[decoded], ~present[decoded])
    assert not replay.missed[~decoded].any()
    assert replay.resident.sum(1).max() == 4


def test_a_prompt_requests_each_expert_once_in_the_order_of_last_use():
    trace = trace_of([[[0, 1]], [[5, 1]], [[2, 0]], [[4, 3]], [[3, 4]]], prompts=[(3, 2), (2, 1)])
    assert requests_of(trace, 0) == [
        Request(2, [0, 5, 1], prompt_tokens=2),
        Request(2, [2, 0]),
        Request(4, [4, 3], prompt_tokens=1),
        Request(4, [3, 4]),
    ]
    assert decoded_tokens(trace).tolist() == [False, False, True, False, True]
    replay = replay_layer(trace, 0, 8, LruPolicy)
    assert replay.prompt_misses == 5
    assert replay.missed.tolist() == [[False] * 2] * 2 + [[True, False]] + [[False] * 2] * 2
    assert [np.flatnonzero(row).tolist() for row in replay.resident] == [
        [],
        [],
        [0, 1, 5],
        [0, 1, 2, 5],
        [0, 1, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize("policy", [*POLICIES.values(), None], ids=[*POLICIES, "belady"])
def test_after_a_long_prompt_the_last_used_are_there(policy):
    trace = trace_of([[[0, 1]], [[2, 3]], [[4, 5]], [[4, 2]], [[0, 5]]], prompts=[(5, 4)])
    assert np.flatnonzero(replay_layer(trace, 0, 3, policy).resident[4]).tolist() == [2, 4, 5]


MIXED = [(40, 9), (30, 0), (1, 1), (60, 33), (25, 1), (44, 2)]


@pytest.mark.parametrize("slots", [(4, 4, 4), (3, 8, 5), (2, 7, 6), (1, 0, 2)])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_cache_misses_what_the_replay_says(policy, slots):
    trace = trace_of(random_experts(8, 200, layers=3), prompts=MIXED)
    cache = ExpertCache(SlowReader(layers=3), slots, policy=policy)
    requests = [requests_of(trace, layer) for layer in range(3)]
    before = cache.stats().layers
    missed = np.zeros((2, 3), int)
    for of_layers in zip(*requests, strict=True):
        for layer, request in enumerate(of_layers):
            use(cache, layer, request)
        after = cache.stats().layers
        missed[int(request.prompt_tokens > 0)] += [
            b.misses - a.misses for a, b in zip(before, after, strict=True)
        ]
        before = after
    replays = [replay_layer(trace, layer, slots[layer], policy) for layer in range(3)]
    assert missed.tolist() == [
        [r.missed.sum() for r in replays],
        [r.prompt_misses for r in replays],
    ]


def use(cache, layer, request):
    if request.prompt_tokens > 1:
        for _ in cache.stream(layer, request.experts, (), ascending=False):
            pass
    else:
        with cache.lease(layer, request.experts) as lease:
            lease.all()


@pytest.mark.parametrize("slots", range(3))
def test_a_layer_may_have_fewer_slots_than_a_token_has_experts(slots):
    trace = trace_of([[[0, 1, 2]], [[2, 1, 0]], [[0, 4, 1]]], count=5)
    missed = replay_layer(trace, 0, slots, LruPolicy).missed
    assert (~missed).tolist() == hits_of_a_recency_list(trace.experts[:, 0].tolist(), slots)


def test_a_layer_has_no_more_slots_than_experts():
    trace = trace_of(random_experts(0, 3))
    for slots in (-1, 9):
        with pytest.raises(ValueError, match=f"{slots} slots"):
            replay_layer(trace, 0, slots, LruPolicy)


def test_recall_counts_the_needed_experts_among_the_first_guesses():
    experts = [[[0, 1], [2, 3]], [[0, 1], [4, 5]]]
    guesses = [[[3, 7, 2, 0]], [[6, 7, 0, 5]]]
    trace = trace_of(experts, guesses=guesses)
    assert recall(trace, trace.guesses).tolist() == [[0.25, 0.25, 0.5, 0.75]]


README_LRU = {
    2: [0.292, 0.315, 0.335, 0.468, 0.548, 0.482, 0.538, 0.578],
    4: [0.561, 0.568, 0.6, 0.749, 0.789, 0.735, 0.804, 0.821],
    6: [0.808, 0.81, 0.845, 0.944, 0.944, 0.908, 0.943, 0.95],
}
README_RECALL = [0.452, 0.796, 0.9, 0.944]
README_RECALL_NEXT_NORM = [0.454, 0.806, 0.905, 0.946]
README_RECALL_2_OF_LAYER_1 = 0.451


@pytest.fixture(scope="module")
def example_traces(example_folder):
    """The original example model on the first 16 windows of each text; the README's numbers are of
    48.
    """
    model, tokenizer = load_checkpoint(example_folder), load_tokenizer(example_folder)
    texts = sorted((example_folder.parent / "text").glob("*.txt"))
    described = TracedModel.of_folder(example_folder)
    return [
        trace_texts(model, tokenizer, described, "tests", [text], max_tokens=16 * 256)
        for text in texts
    ]


@pytest.mark.parametrize("slots", README_LRU)
def test_the_examples_hit_ratios_are_those_of_its_readme(example_traces, slots):
    found = np.mean(
        [
            [1 - replay_layer(t, layer, slots, LruPolicy).missed.mean() for layer in range(8)]
            for t in example_traces
        ],
        0,
    )
    assert found.mean() == pytest.approx(np.mean(README_LRU[slots]), abs=0.01)
    # A third of the windows: single layers vary more than their mean.
    np.testing.assert_allclose(found, README_LRU[slots], atol=0.02)


def test_the_examples_recall_is_that_of_its_readme(example_traces):
    this_norm = np.mean([recall(t, t.guesses) for t in example_traces], 0)
    next_norm = np.mean([recall(t, t.guesses_next_norm) for t in example_traces], 0)
    np.testing.assert_allclose(this_norm.mean(0), README_RECALL, atol=0.01)
    np.testing.assert_allclose(next_norm.mean(0), README_RECALL_NEXT_NORM, atol=0.01)
    assert this_norm[0, 1] == pytest.approx(README_RECALL_2_OF_LAYER_1, abs=0.01)
    assert next_norm.mean(0)[1] > this_norm.mean(0)[1]


def test_the_loader_misses_what_the_replay_says(converted):
    folder = converted("2bit")
    slot_bytes = sum(TracedModel.of_folder(folder).expert_bytes)
    model = from_pretrained(folder, ram_cache=4 * slot_bytes)
    torch.manual_seed(0)
    with RoutingRecorder(model, 4) as recorder, torch.inference_mode():
        # From one token on, so that every forward pass is a decoded token's.
        model.generate(
            torch.tensor([[300]]),
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=True,
            top_k=0,
            pad_token_id=2,
        )
        routing = recorder.take()
    trace, stats = trace_of(routing.experts), model.moe_stats()
    assert all(2 < slots < 8 for slots in stats.slots)
    for layer, (counted, slots) in enumerate(zip(stats.layers, stats.slots, strict=True)):
        missed = replay_layer(trace, layer, slots, LrfuPolicy).missed
        assert (counted.misses, counted.hits) == (missed.sum(), (~missed).sum())
