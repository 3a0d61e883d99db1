from types import SimpleNamespace

import pytest

from formats.artifact import Artifact
from formats.errors import DoesNotFitError, RecipeError
from formats.files import control_group
from formats.sizes import parse_size
from loader.budget import ram as budget
from loader.budget.expert_sizes import expert_bytes_by_layer, staging_bytes
from loader.budget.ram import ram_budget
from loader.budget.slot_counts import check_slots, slots_by_layer


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("6GiB", 6 * 2**30),
        ("6GB", 6 * 10**9),
        ("6 gb", 6 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("500", 500),
        (12345, 12345),
        ("123456789012345678", 123456789012345678),
    ],
)
def test_sizes_are_read_as_people_write_them(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "6G", "GiB", "-1GiB", "1e9", "nan", "0", 0, -5, True, 1.5, None, "6 GiB x", "١GiB"[1:]],
)
def test_nonsense_is_no_size_and_is_named(text):
    with pytest.raises(RecipeError, match="ram_cache"):
        parse_size(text, "ram_cache")


def slots_of(budget_bytes, artifact, all_in_place=True):
    return slots_by_layer(budget_bytes, artifact, 2, all_in_place=all_in_place)


def test_budget_is_shared_by_all_layers_and_what_is_on_its_way(converted):
    artifact = Artifact.open(converted("2bit"))
    three = 3 * sum(expert_bytes_by_layer(artifact)) + staging_bytes(artifact, 2)
    assert slots_of(three, artifact) == (3,) * 8
    assert slots_of(10**12, artifact) == slots_of(10**12, artifact, all_in_place=False) == (8,) * 8


def test_what_is_left_gives_some_layers_one_more_evenly_spread(converted):
    artifact = Artifact.open(converted("2bit"))
    sizes = expert_bytes_by_layer(artifact)
    three = 3 * sum(sizes) + staging_bytes(artifact, 2)
    assert slots_of(three + sizes[0], artifact) == (4, 3, 3, 3, 3, 3, 3, 3)
    assert slots_of(three + 2 * sizes[0], artifact) == (4, 3, 3, 3, 4, 3, 3, 3)
    assert slots_of(three + 4 * sizes[0] + 1, artifact) == (4, 3, 4, 3, 4, 3, 4, 3)
    assert slots_of(three - 1, artifact) == (3, 3, 3, 3, 3, 3, 3, 2)


def test_experts_that_all_fit_where_they_lie_need_nothing_beside_them(converted):
    artifact = Artifact.open(converted("2bit"))
    everything = 8 * sum(expert_bytes_by_layer(artifact))
    assert slots_of(everything, artifact) == (8,) * 8
    assert sum(slots_of(everything, artifact, all_in_place=False)) == 62


def test_too_small_budget_names_the_least_that_works(converted):
    artifact = Artifact.open(converted("2bit"))
    least = 2 * expert_bytes_by_layer(artifact)[0]
    with pytest.raises(DoesNotFitError, match=str(least)) as e:
        slots_of(least - 1, artifact)
    assert e.value.exit_code == 4
    assert slots_of(least, artifact) == (0,) * 8


@pytest.mark.parametrize(
    ("slots", "part"),
    [
        ([2] * 7, "7 numbers for 8"),
        ([2] * 7 + [-1], "-1 for layer 7"),
        ([9] + [2] * 7, "9 for layer 0"),
    ],
)
def test_impossible_slots_are_refused(converted, slots, part):
    with pytest.raises(RecipeError, match=part):
        check_slots(slots, Artifact.open(converted("2bit")))


def test_auto_leaves_the_reserve_and_the_trunk_free(converted, monkeypatch):
    artifact = Artifact.open(converted("2bit"))
    trunk = artifact.index.trunk.size_bytes
    monkeypatch.setattr(budget, "available_memory", lambda: (4 << 30, 8 << 30))
    assert ram_budget("auto", artifact) == (4 << 30) - (512 << 20) - trunk
    monkeypatch.setattr(budget, "available_memory", lambda: (30 << 30, 64 << 30))
    assert ram_budget("auto", artifact) == (26 << 30) - trunk
    monkeypatch.setattr(budget, "available_memory", lambda: (1 << 20, 8 << 30))
    assert ram_budget("auto", artifact) == 0


def test_a_containers_limit_counts_where_it_is_lower(tmp_path, monkeypatch):
    machine = SimpleNamespace(available=8 << 30, total=16 << 30)
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(control_group, "_ROOT", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert budget.available_memory() == (8 << 30, 16 << 30)
    (tmp_path / "memory.max").write_text(f"{2 << 30}\n")
    assert budget.available_memory() == ((2 << 30) - 1000, 2 << 30)
