import pytest
from pattern_reader import EXPERT_BYTES, PatternReader
from recording_device import RecordingDevice

from formats.errors import DoesNotFitError, RecipeError
from loader.cuda.experts.gpu_budget import (
    ALLOCATION_BYTES,
    RESERVE_BYTES,
    gpu_expert_bytes,
    gpu_slots,
    split_layers,
)

GIB = 1 << 30


def device(gib=8.0, used=0, name="cuda:0"):
    result = RecordingDevice(capacity_bytes=int(gib * GIB), name=name)
    result.used_bytes += used
    return result


def test_auto_leaves_the_trunk_and_the_reserve_free():
    reserve = RESERVE_BYTES + GIB // 2
    assert gpu_expert_bytes("auto", device(), 1000) == 8 * GIB - reserve
    assert gpu_expert_bytes("auto", device(used=GIB), 1000, 2 * GIB) == 5 * GIB - reserve


def test_what_is_given_is_taken():
    assert gpu_expert_bytes("6GiB", device(), 1000, 2 * GIB) == 6 * GIB
    assert gpu_expert_bytes(6 * GIB, device(), 1000) == 6 * GIB
    with pytest.raises(RecipeError, match="gpu_cache"):
        gpu_expert_bytes("much", device(), 1000)


@pytest.mark.parametrize(
    ("gpu_cache", "trunk"), [("auto", 7 * GIB), ("6GiB", 3 * GIB), (100, 0), ("100MiB", 8 * GIB)]
)
def test_what_does_not_fit_is_refused_with_all_numbers(gpu_cache, trunk):
    least = 200 << 20
    with pytest.raises(DoesNotFitError) as error:
        gpu_expert_bytes(gpu_cache, device(), least, trunk)
    message = error.value.message
    for number in (8 * GIB, trunk, least):
        assert str(number) in message
    assert message.startswith("cuda:0: ")
    assert error.value.hint


def test_the_hint_names_what_would_work():
    with pytest.raises(DoesNotFitError, match="give gpu_cache of 200MiB to 5120MiB"):
        gpu_expert_bytes("6GiB", device(), 200 << 20, 3 * GIB)
    with pytest.raises(DoesNotFitError, match="give gpu_cache, 200MiB at least"):
        gpu_expert_bytes("auto", device(), 200 << 20, 7 * GIB)
    with pytest.raises(DoesNotFitError, match="use device='cpu'"):
        gpu_expert_bytes("auto", device(), 200 << 20, 8 * GIB)


def artifact(sizes):
    return PatternReader(sizes, 8, RecordingDevice()).artifact


def test_slots_are_what_the_budget_holds_beside_those_on_their_way():
    sizes = [EXPERT_BYTES] * 4
    found = gpu_slots((3 * 4 + 2 + 1) * EXPERT_BYTES, [device()], artifact(sizes), 2, [0])
    assert found.slots == (4, 3, 3, 3)
    assert {each.name for each in found.devices} == {"cuda:0"}
    assert {id(memory) for memory in found.memory} == {id(found.memory[0])}
    assert found.memory[0].piece_bytes == ALLOCATION_BYTES


def test_each_gpu_has_its_own_slots_and_those_on_their_way():
    sizes = [EXPERT_BYTES] * 8
    gpus = [device(), device(name="cuda:1")]
    found = gpu_slots((2 * 4 + 2) * EXPERT_BYTES, gpus, artifact(sizes), 2, [0, 0])
    assert found.slots == (2,) * 8
    assert [each.name for each in found.devices] == ["cuda:0"] * 4 + ["cuda:1"] * 4
    assert found.memory[0] is found.memory[3] is not found.memory[4]


def test_a_larger_gpu_gets_more_layers():
    sizes = [EXPERT_BYTES] * 8
    found = gpu_slots("auto", [device(4), device(12, name="cuda:1")], artifact(sizes), 2, [0, 0])
    assert [each.name for each in found.devices].count("cuda:0") == 2


def test_experts_of_several_sizes_need_those_on_their_way_of_each():
    sizes = [EXPERT_BYTES, 2 * EXPERT_BYTES]
    with pytest.raises(DoesNotFitError, match=str(6 * EXPERT_BYTES)):
        gpu_slots(6 * EXPERT_BYTES - 1, [device()], artifact(sizes), 2, [0])
    assert gpu_slots(6 * EXPERT_BYTES, [device()], artifact(sizes), 2, [0]).slots == (0, 0)


@pytest.mark.parametrize(
    ("sizes", "budgets", "expected"),
    [
        ([1] * 4, [5], [0, 0, 0, 0]),
        ([1] * 4, [5, 5], [0, 0, 1, 1]),
        ([3, 1, 1, 1], [5, 5], [0, 1, 1, 1]),
        ([1] * 4, [1, 3], [0, 1, 1, 1]),
        ([1] * 2, [1, 1, 1, 1], [1, 3]),
    ],
)
def test_layers_are_split_in_one_piece_each(sizes, budgets, expected):
    assert split_layers(sizes, budgets) == expected
