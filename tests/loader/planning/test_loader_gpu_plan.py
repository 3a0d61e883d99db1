import json
from types import SimpleNamespace

import pytest
from project_paths import ROOT

from converter.output.planned_folder import PlannedFolder
from converter.recipe.recipes import make_recipe
from formats.errors import DoesNotFitError
from formats.model_memory import PROCESS_BYTES
from loader.budget.expert_sizes import staging_experts
from loader.budget.slot_counts import slots_by_layer, tier_counts
from loader.cuda.experts.stack import TIER_STAGING
from loader.experts.policy import LrfuPolicy
from loader.planning.gpu_plan import (
    CONTEXT_BYTES,
    CUDA_PROCESS_BYTES,
    GPU_EFFICIENCY,
    GpuMachine,
    plan_gpu,
)
from loader.planning.memory_plan import ModelSizes
from loader.traces.tier_misses import uniform_tier_misses

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
    MADE, stored=(90, 250), trunk=1000, trunk_read=800, kv_per_position=2, in_place=True
)
MACHINE = GpuMachine(link_bytes_per_s=1_000, gpu_memory_bytes_per_s=10_000, disk_bytes_per_s=500)
# 50 positions of KV cache; a prompt of one token, whose activations take 4 * (2 * 10 + 4 * 5).
ON_GPU = 1000 + 2 * 50 + CONTEXT_BYTES + 160
PROCESS = PROCESS_BYTES + CUDA_PROCESS_BYTES
ASIDE = 2 * 400
IN_RAM = TIER_STAGING * 400
PAGE = ROOT / "docs" / "plan.md"


def misses_of(gpu=0.5, both=0.25):
    return lambda layer, slots, in_ram: (gpu, both)


def planned(gpu_cache, ram_cache=None, misses=None, machine=MACHINE):
    return plan_gpu(
        SIZES, machine, ON_GPU + gpu_cache, None if ram_cache is None else PROCESS + ram_cache,
        context=50, prompt=1, tier_misses=misses or misses_of(),
    )  # fmt: skip


def test_what_trunk_kv_cache_context_and_activations_leave_goes_to_experts():
    gpu = planned(ASIDE + 3 * 400 + 399).gpu
    assert (gpu.trunk_bytes, gpu.kv_bytes, gpu.workspace_bytes) == (1000, 100, CONTEXT_BYTES + 160)
    assert gpu.cache_bytes == ASIDE + 3 * 400 + 399
    assert gpu.slots == (4, 3)
    assert (gpu.aside_bytes, gpu.slot_bytes) == (ASIDE, 4 * 100 + 3 * 300)


def test_all_experts_on_the_gpu_leave_room_for_those_on_their_way():
    assert planned(8 * 400).gpu.slots == (6, 6)
    assert planned(8 * 400 + ASIDE).gpu.slots == (8, 8)


def test_without_a_budget_ram_holds_all_experts_and_no_disk_is_needed():
    machine = GpuMachine(1_000, 10_000, None)
    plan = planned(ASIDE, machine=machine, misses=misses_of(both=0))
    assert plan.ram_bytes == PROCESS + 8 * 400
    assert (plan.slots, plan.aside_bytes, plan.slot_bytes) == ((8, 8), 0, 8 * 400)
    assert (plan.trunk_bytes, plan.kv_bytes, plan.read_bytes_per_token) == (0, 0, 0)


def test_less_ram_holds_what_the_tier_makes_of_it():
    for cache in range(IN_RAM, 8 * 400, 130):
        plan = planned(ASIDE, cache)
        assert dict(zip(IN_MEMORY, plan.slots, strict=True)) == tier_counts(
            cache, MADE, TIER_STAGING
        )
        assert plan.slot_bytes <= plan.cache_bytes == cache


def test_layers_of_one_size_share_the_tier_evenly():
    same = SimpleNamespace(
        **vars(MADE) | {"layout": lambda layer, expert: SimpleNamespace(n_bytes=100)}
    )
    sizes = ModelSizes(
        same, stored=(90, 90), trunk=1000, trunk_read=800, kv_per_position=2, in_place=True
    )
    plan = plan_gpu(
        sizes, MACHINE, 1 << 30, PROCESS + 950, context=50, prompt=1, tier_misses=misses_of()
    )
    assert plan.slots == (4, 5)


def test_each_layer_is_asked_for_its_misses_with_its_slots():
    asked = []

    def misses(layer, slots, in_ram):
        asked.append((layer, slots, in_ram))
        return (0.5, 0.25) if layer else (0.1, 0.0)

    plan = planned(ASIDE + 3 * 400 + 100, 6 * 400, misses)
    assert asked == [(0, 4, plan.slots[0]), (1, 3, plan.slots[1])]
    assert plan.gpu.miss_ratio == pytest.approx(0.3)
    assert plan.miss_ratio == pytest.approx(0.125)
    # In memory over the link, as stored from the disk.
    assert plan.gpu.copied_bytes_per_token == pytest.approx(2 * (0.1 * 100 + 0.5 * 300))
    assert plan.read_bytes_per_token == pytest.approx(2 * 0.25 * 250)


@pytest.mark.parametrize(
    ("link", "memory", "disk", "slowest"),
    [(1e3, 1e5, 1e4, 0.4), (1e5, 1e3, 1e4, 2.1), (1e5, 1e5, 1e2, 1.7)],
    ids=["link", "GPU memory", "disk"],
)
def test_perfect_overlap_is_as_fast_as_the_slowest_of_link_memory_and_disk(
    link, memory, disk, slowest
):
    plan = planned(ASIDE, IN_RAM, machine=GpuMachine(link, memory, disk))
    # 800 of the trunk, 2 * 400 of experts, 100 of keys and values are used; 0.5 * 2 * 400 copied;
    # 0.25 * 2 * 340 read.
    seconds = 400 / link, (1700 + 400) / memory, 170 / disk
    assert max(seconds) == slowest
    assert plan.tokens_per_s == pytest.approx((GPU_EFFICIENCY / sum(seconds), 1 / slowest))


def test_a_disk_that_is_needed_must_have_a_speed():
    with pytest.raises(ValueError, match="unknown speed"):
        planned(ASIDE, IN_RAM, machine=GpuMachine(1_000, 10_000, None))


def test_too_little_gpu_memory_is_refused_with_the_least_that_works():
    with pytest.raises(
        DoesNotFitError,
        match=f"GPU memory of {ON_GPU + ASIDE - 1} bytes.*must hold {ON_GPU + ASIDE} bytes",
    ) as e:
        planned(ASIDE - 1)
    assert "at least 513MiB" in e.value.hint
    assert planned(ASIDE).gpu.slots == (0, 0)


def test_too_little_ram_is_refused_with_the_least_that_works():
    with pytest.raises(
        DoesNotFitError,
        match=f"RAM of {PROCESS + IN_RAM - 1} bytes.*must hold {PROCESS + IN_RAM} bytes",
    ) as e:
        planned(ASIDE, IN_RAM - 1)
    assert "at least 833MiB" in e.value.hint
    assert planned(ASIDE, IN_RAM).slots == (TIER_STAGING, TIER_STAGING)


def test_the_documents_numbers_of_8x7b_are_what_is_computed(example_folder, tmp_path):
    config = json.loads((example_folder / "config.json").read_text())
    config |= {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    }
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outline = PlannedFolder.plan(tmp_path, make_recipe("2bit"))
    sizes = ModelSizes.of_parts(outline, outline.trunk)
    misses = uniform_tier_misses(sizes.architecture, LrfuPolicy)
    page = PAGE.read_text()
    for vram in (6, 8, 12, 16, 24):
        machines = [
            GpuMachine(link * 1e9, memory * 1e9, None)
            for link, memory in ((12, 300), (25, 360), (25, 1008))
        ]
        plans = [
            plan_gpu(
                sizes, machine, vram * 10**9, None, context=4096, prompt=512, tier_misses=misses
            )
            for machine in machines
        ]
        gpu = plans[0].gpu
        assert gpu.slots == slots_by_layer(
            gpu.cache_bytes, sizes.experts, staging_experts(sizes.architecture), all_in_place=False
        )
        slots = " or ".join(str(count) for count in sorted(set(gpu.slots)))
        speeds = " | ".join("{:.1f} to {:.1f}".format(*plan.tokens_per_s) for plan in plans)
        row = (
            f"| {vram} GB | {slots} | {gpu.miss_ratio:.3f} "
            f"| {gpu.copied_bytes_per_token / 1e6:.0f} | {speeds} |"
        )
        assert row in page, row
        assert f"({plans[0].ram_bytes / 1e9:.1f} GB with the process)" in page
