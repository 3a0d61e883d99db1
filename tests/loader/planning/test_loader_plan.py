from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from made_traces import random_experts, trace_of

from converter.convert import ConvertOptions, convert_checkpoint
from converter.output.planned_folder import PlannedFolder
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from formats.model_memory import PROCESS_BYTES, kv_position_bytes
from loader.budget.expert_sizes import staging_bytes
from loader.budget.slot_counts import slots_of_folder
from loader.decode import kv_blocks
from loader.experts.policy import LruPolicy
from loader.planning.memory_plan import (
    EFFICIENCY,
    Machine,
    ModelSizes,
    plan_memory,
    plan_shares,
    traced_miss_ratios,
    uniform_miss_ratios,
)
from loader.traces.replay import replay_layer

ARCHITECTURE = SimpleNamespace(
    num_hidden_layers=2,
    expert_layers=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    hidden_size=5,
    intermediate_size=10,
)
IN_MEMORY = (100, 300)
MADE = SimpleNamespace(
    folder="made",
    architecture=ARCHITECTURE,
    layout=lambda layer, expert: SimpleNamespace(n_bytes=IN_MEMORY[layer]),
)
SIZES = ModelSizes(
    MADE, stored=(90, 300), trunk=1000, trunk_read=800, kv_per_position=2, in_place=True
)
MACHINE = Machine(memory_bytes_per_s=10_000, disk_bytes_per_s=1_000)
# 50 positions of KV cache; a prompt of one token, whose activations take 4 * (2 * 10 + 4 * 5).
FIXED = 1000 + 2 * 50 + PROCESS_BYTES + 160
ASIDE = 2 * 400


def planned(cache, sizes=SIZES, **options):
    return plan_memory(sizes, MACHINE, FIXED + cache, context=50, prompt=1, **options)


def test_what_trunk_kv_cache_and_the_process_leave_goes_to_experts():
    plan = planned(ASIDE + 3 * 400 + 399)
    assert (plan.trunk_bytes, plan.kv_bytes, plan.workspace_bytes) == (
        1000,
        100,
        PROCESS_BYTES + 160,
    )
    assert plan.cache_bytes == ASIDE + 3 * 400 + 399
    assert plan.slots == (4, 3)
    assert (plan.aside_bytes, plan.slot_bytes) == (ASIDE, 4 * 100 + 3 * 300)


def test_all_experts_used_in_place_leave_none_on_their_way():
    assert (planned(8 * 400).slots, planned(8 * 400).aside_bytes) == ((8, 8), 0)
    copied = ModelSizes(
        MADE, stored=(90, 300), trunk=1000, trunk_read=800, kv_per_position=2, in_place=False
    )
    assert planned(8 * 400, copied).slots == (6, 6)
    assert planned(8 * 400 + ASIDE, copied).aside_bytes == ASIDE


def test_slots_are_those_that_the_loader_makes(converted):
    artifact = Artifact.open(converted("2bit"))
    sizes = ModelSizes.of_folder(artifact)
    for share in (0.1, 0.3, 0.77, 1):
        cache = max(sizes.staging_bytes, int(share * sizes.all_experts))
        plan = plan_memory(sizes, MACHINE, sizes.fixed(64, 8) + cache, context=64, prompt=8)
        assert plan.slots == slots_of_folder(artifact, plan.cache_bytes, "auto")


def test_speed_lies_between_no_overlap_and_perfect_overlap():
    plan = planned(ASIDE + 3 * 400)
    # 5 of 8 missed: 5/8 of 780 stored bytes from the disk; 800 + 800 + 100 from memory.
    assert plan.miss_ratio == 5 / 8
    assert plan.read_bytes_per_token == 487.5
    assert plan.tokens_per_s == pytest.approx((EFFICIENCY / (0.4875 + 0.17), 1 / 0.4875))


def test_with_all_experts_in_memory_only_memory_counts():
    assert planned(8 * 400).tokens_per_s == pytest.approx((EFFICIENCY / 0.17, 1 / 0.17))


def test_a_trace_replaces_the_uniform_assumption():
    ratios = [{3: 0.25}, {3: 0.5}]
    assert planned(ASIDE + 3 * 400, miss_ratios=ratios).read_bytes_per_token == 2 * (
        0.25 * 90 + 0.5 * 300
    )


def test_too_little_memory_is_refused_with_the_least_that_works():
    with pytest.raises(DoesNotFitError, match=f"{FIXED + ASIDE} in all") as found:
        planned(ASIDE - 1)
    assert "at least 321MiB" in found.value.hint
    assert planned(ASIDE).slots == (0, 0)


def test_shares_of_the_experts_begin_with_the_least_that_works():
    plans = plan_shares(SIZES, MACHINE, (0.1, 0.5, 1), context=50, prompt=1)
    assert [plan.cache_bytes for plan in plans] == [ASIDE, 1600, 3200]
    assert [plan.ram_bytes for plan in plans] == [FIXED + ASIDE, FIXED + 1600, FIXED + 3200]


def test_sizes_of_a_folder_are_those_of_its_index(converted):
    artifact = Artifact.open(converted("2bit"))
    sizes = ModelSizes.of_folder(artifact)
    assert sizes.trunk - sizes.trunk_read == 4096 * 192 * 2
    assert 0 <= artifact.index.trunk.size_bytes - sizes.trunk < 16 << 10
    assert sizes.stored == (artifact.entry(0, 0).length,) * 8
    assert sizes.kv_per_position == 2 * 8 * 2 * 32 * 2
    assert sizes.staging_bytes == staging_bytes(artifact, 2)
    assert sizes.in_place


def test_compressed_experts_are_read_compressed_and_copied(example_folder, tmp_path):
    convert_checkpoint(
        example_folder,
        tmp_path / "out",
        make_recipe("2bit", solver="hqq"),
        ConvertOptions(codec="zstd"),
    )
    artifact = Artifact.open(tmp_path / "out")
    sizes = ModelSizes.of_folder(artifact)
    assert not sizes.in_place
    assert sizes.stored[0] == sum(artifact.entry(0, expert).length for expert in range(8)) / 8
    assert sizes.all_experts == 64 * artifact.layout(0, 0).n_bytes


def test_a_position_in_8_bits_takes_its_share_of_a_block(converted):
    shape = Artifact.open(converted("2bit")).architecture
    for width in (16, 80, 128):
        changed = msgspec.structs.replace(shape, head_dim=width)
        blocks = 2 * shape.num_hidden_layers * shape.num_key_value_heads
        n_bytes = blocks * kv_blocks.block_bytes(width) / kv_blocks.POSITIONS
        assert kv_position_bytes(changed, 2, 8) == n_bytes


@pytest.mark.parametrize("recipe", ["2bit", "4bit"])
def test_a_checkpoint_is_planned_as_its_conversion_will_be(converted, example_folder, recipe):
    converted_sizes = ModelSizes.of_folder(Artifact.open(converted(recipe)))
    outline = PlannedFolder.plan(Path(example_folder), make_recipe(recipe, solver="hqq"))
    sizes = ModelSizes.of_parts(outline, outline.trunk)
    for name in (
        "stored",
        "trunk",
        "trunk_read",
        "kv_per_position",
        "in_place",
        "all_experts",
        "staging_bytes",
    ):
        assert getattr(sizes, name) == getattr(converted_sizes, name), name


def test_uniform_ratios_are_those_of_uniform_routing():
    trace = trace_of(random_experts(0, 20_000, skew=0))
    expected = uniform_miss_ratios(trace.header.architecture)[0]
    for slots in range(9):
        found = replay_layer(trace, 0, slots, LruPolicy).missed.mean()
        assert found == pytest.approx(expected[slots], abs=0.01)


def test_traced_ratios_are_of_each_layers_decoded_tokens():
    trace = trace_of(
        random_experts(1, 300, layers=2), expert_bytes=[100, 300], prompts=[(200, 50), (100, 0)]
    )
    for layer, ratios in enumerate(traced_miss_ratios(trace, LruPolicy)):
        missed = replay_layer(trace, layer, 4, LruPolicy).missed.sum()
        assert ratios[4] == pytest.approx(missed / (250 * 2))
