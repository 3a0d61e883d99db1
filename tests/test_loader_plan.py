import pytest
from made_traces import random_experts, trace_of

from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from loader.plan import Machine, ModelSizes, plan_memory, traced_miss_ratios, uniform_miss_ratios
from loader.policy import LruPolicy
from loader.replay import replay_layer

SIZES = ModelSizes(trunk=1000, trunk_read=800, experts=(100, 300), kv_per_position=2, chosen=2, count=8)
MACHINE = Machine(memory_bytes_per_s=10_000, disk_bytes_per_s=1_000)


def planned(ram, **options):
    return plan_memory(SIZES, MACHINE, ram, context=50, workspace_bytes=100, **options)


def test_slots_are_what_the_budget_holds_beside_trunk_kv_and_workspace():
    plan = planned(1000 + 2 * 50 + 100 + 3 * 400 + 399)
    assert plan.slots == (3, 3)
    assert (plan.trunk_bytes, plan.kv_bytes, plan.workspace_bytes, plan.expert_bytes) == (1000, 100, 100, 1200)
    assert plan.total_bytes == 2400
    assert planned(10**9).slots == (8, 8)


def test_speed_lies_between_no_overlap_and_perfect_overlap():
    plan = planned(2400)
    # 5 of 8 missed: 500 of 800 bytes from the disk; 800 + 800 + 100 from memory.
    assert plan.miss_ratio == 5 / 8
    assert plan.read_bytes_per_token == 500
    assert plan.tokens_per_s == pytest.approx((1 / (0.5 + 0.17), 1 / 0.5))


def test_with_all_experts_in_memory_only_memory_counts():
    assert planned(10**9).tokens_per_s == pytest.approx((1 / 0.17, 1 / 0.17))


def test_a_trace_replaces_the_uniform_assumption():
    assert planned(2400, miss_ratios={3: 0.25}).read_bytes_per_token == 200


def test_too_little_memory_is_refused_with_the_least_that_works():
    with pytest.raises(DoesNotFitError, match="take 2000") as found:
        planned(1999)
    assert "at least 1MiB" in found.value.hint
    assert planned(2000).slots == (2, 2)


def test_sizes_of_a_folder_are_those_of_its_index(converted):
    index = Artifact.open(converted("2bit")).index
    sizes = ModelSizes.of_index(index)
    assert sizes.trunk - sizes.trunk_read == 4096 * 192 * 2
    assert sizes.experts == (index.layers[0].experts[0].length,) * 8
    assert sizes.kv_per_position == 2 * 8 * 2 * 32 * 2


def test_uniform_ratios_are_those_of_uniform_routing():
    trace = trace_of(random_experts(0, 20_000, skew=0))
    expected = uniform_miss_ratios(SIZES)
    for slots in range(2, 9):
        found = replay_layer(trace, 0, slots, LruPolicy).missed.mean()
        assert found == pytest.approx(expected[slots], abs=0.01)


def test_traced_ratios_weigh_layers_by_their_bytes():
    trace = trace_of(random_experts(1, 300, layers=2), expert_bytes=[100, 300], prompts=[(200, 50), (100, 0)])
    missed = [replay_layer(trace, layer, 4, LruPolicy).missed.sum() for layer in range(2)]
    expected = (missed[0] * 100 + missed[1] * 300) / (250 * 2 * 400)
    assert traced_miss_ratios(trace, [LruPolicy] * 2)[4] == pytest.approx(expected)
