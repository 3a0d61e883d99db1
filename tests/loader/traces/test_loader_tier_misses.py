import pytest
from made_traces import random_experts, trace_of
from pattern_reader import GpuCache

from loader.experts.policy import POLICIES, LrfuPolicy, LruPolicy
from loader.traces.replay import Request, replay_layer, requests_of
from loader.traces.tier_misses import replay_tiers, traced_tier_misses, uniform_tier_misses


def tokens(*experts):
    return [Request(number, list(chosen)) for number, chosen in enumerate(experts)]


def test_the_gpu_misses_what_it_would_miss_without_ram_behind_it():
    trace = trace_of(random_experts(0, 500))
    expected = replay_layer(trace, 0, 3, LruPolicy).missed.sum()
    for ram in (0, 4, 8):
        assert replay_tiers(requests_of(trace, 0), 3, ram, LruPolicy)[0] == expected


def test_ram_keeps_what_went_to_the_gpu():
    # Two slots: the third token pushes 0 and 1 out of the GPU, not out of RAM.
    assert replay_tiers(tokens((0, 1), (2, 3), (0, 1)), 2, 4, LruPolicy) == (6, 4)
    assert replay_tiers(tokens((0, 1), (2, 3), (1, 0)), 2, 3, LruPolicy) == (6, 5)
    assert replay_tiers(tokens((0, 1), (2, 3), (0, 1)), 2, 0, LruPolicy) == (6, 6)


def test_ram_is_not_asked_for_what_the_gpu_has():
    # 0 stays on the GPU and ages in RAM, which 1, 2 and 3 fill meanwhile.
    requests = tokens((0,), (1,), (0,), (2,), (0,), (3,), (0,))
    assert replay_tiers(requests, 2, 3, LruPolicy) == (4, 4)
    requests += tokens((4,), (5,), (0,))
    assert replay_tiers(requests, 2, 3, LruPolicy) == (7, 7)


def test_misses_of_prompts_fill_both_and_are_not_counted():
    prompt = Request(4, [0, 1, 2, 3], prompt_tokens=4)
    assert replay_tiers([prompt, Request(4, [0, 3])], 2, 4, LruPolicy) == (1, 0)
    assert replay_tiers([prompt, Request(4, [0, 3])], 2, 0, LruPolicy) == (1, 1)


def test_uniform_misses_fall_with_slots_on_the_gpu_and_with_ram():
    architecture = trace_of(random_experts(0, 1)).header.architecture
    misses = uniform_tier_misses(architecture, LrfuPolicy)
    for gpu in range(9):
        shares = [misses(0, gpu, ram) for ram in range(9)]
        assert {on_gpu for on_gpu, _ in shares} == {1 - gpu / 8}
        both = [both for _, both in shares]
        assert both[0] == 1 - gpu / 8 and both[8] == 0
        assert both == sorted(both, reverse=True)


def test_ram_behind_no_slots_misses_as_a_cache_alone_does():
    architecture = trace_of(random_experts(0, 1, chosen=1)).header.architecture
    misses = uniform_tier_misses(architecture, LrfuPolicy)
    for ram in range(9):
        assert misses(0, 0, ram)[1] == pytest.approx(1 - ram / 8, abs=0.02)


def test_traced_misses_are_of_each_layers_decoded_tokens():
    trace = trace_of(random_experts(1, 300, layers=2), prompts=[(200, 50), (100, 0)])
    misses = traced_tier_misses(trace, LruPolicy)
    for layer in range(2):
        alone = replay_layer(trace, layer, 4, LruPolicy).missed.sum() / (250 * 2)
        assert misses(layer, 4, 8) == (pytest.approx(alone), 0)
        assert misses(layer, 4, 0) == (pytest.approx(alone), pytest.approx(alone))
        assert 0 < misses(layer, 4, 5)[1] < alone


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("gpu", "ram"), [(2, 5), (4, 6), (4, 3)])
def test_the_engine_misses_what_the_replay_says(policy, gpu, ram):
    requests = requests_of(trace_of(random_experts(3, 300, chosen=1)), 0)
    assert engine_misses(requests, gpu, ram, policy, top_k=1) == replay_tiers(
        requests, gpu, ram, policy
    )


def test_two_misses_of_a_token_come_to_ram_in_either_order_which_changes_little():
    requests = requests_of(trace_of(random_experts(3, 300)), 0)
    found, expected = (
        misses(requests, 4, 6, LrfuPolicy) for misses in (engine_misses, replay_tiers)
    )
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=0.1 * expected[0])


def engine_misses(requests, gpu, ram, policy, top_k=2):
    stack = GpuCache(gpu, layers=1, ram=ram, policy=policy, top_k=top_k, piece_buffers=8)
    for request in requests:
        stack.token(0, request.experts)
    stack.check_counts()
    return stack.cache.stats().total.misses, stack.tier.stats().misses
