"""Verification: the damage that the quick and the full one report, with its place."""

import os
from pathlib import Path

import pytest
from bad_folders import VECTORS, copy_of_good, spoil
from damaged_files import cut, flip
from make_vectors import CONFIG, write_folder

from formats.artifact import Artifact
from formats.errors import MoeConvertError
from formats.reading.verify import Problem, Sample, verify_folder
from formats.repair.index_rebuild import rebuild_index

LAYER = "experts/layer-000.safetensors"


def problems(folder: Path, *, read_data: bool = True) -> list[Problem]:
    return verify_folder(folder, read_data=read_data).problems


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_good_folder_has_no_problems(tmp_path: Path, codec: str) -> None:
    folder = write_folder(tmp_path / "f", codec=codec, config={**CONFIG, "num_hidden_layers": 2})
    assert problems(folder) == []


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_flipped_byte_of_an_expert_is_found_with_its_place(
    tmp_path: Path, codec: str, where: str
) -> None:
    folder = write_folder(tmp_path / "f", codec=codec, config={**CONFIG, "num_hidden_layers": 2})
    entry = Artifact.open(folder).entry(1, 1)
    at = {"first": 0, "middle": entry.length // 2, "last": entry.length - 1}[where]
    flip(folder / "experts/layer-001.safetensors", entry.offset + at)
    (problem,) = problems(folder)
    assert (problem.file, problem.layer, problem.expert) == ("experts/layer-001.safetensors", 1, 1)
    assert problem.offset == entry.offset
    assert f"layer 1 expert 1 at offset {entry.offset}: its sha256 is " in problem.message
    assert entry.sha256 in problem.message
    assert problem.hint


def test_flipped_byte_of_an_expert_is_not_seen_by_the_quick_check(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    flip(folder / LAYER, 5000)
    report = verify_folder(folder)
    assert (report.problems, report.checked_bytes) == ([], 0)


def test_flipped_byte_of_the_trunk_is_found(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    flip(folder / "trunk.safetensors", 20000)
    (problem,) = problems(folder)
    assert problem.file == "trunk.safetensors"
    assert problem.message.startswith(str(folder / "trunk.safetensors"))
    assert problems(folder, read_data=False) == []


@pytest.mark.parametrize("change", ["edited", "missing", "fifo"])
def test_file_beside_the_weights_is_reported_but_does_not_keep_them_from_loading(
    tmp_path: Path, change: str
) -> None:
    folder = copy_of_good(tmp_path)
    if change == "edited":
        (folder / "LICENSE").write_text("another")
    else:
        (folder / "LICENSE").unlink()
    if change == "fifo":
        os.mkfifo(folder / "LICENSE")
    Artifact.open(folder)
    assert [p.file for p in problems(folder, read_data=False)] == ["LICENSE"]


def test_flipped_byte_of_a_copied_file_is_found(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    flip(folder / "LICENSE", 0)
    assert [p.file for p in problems(folder)] == ["LICENSE"]


@pytest.mark.parametrize("name", [LAYER, "trunk.safetensors"])
def test_flipped_byte_of_any_header_is_seen_by_the_quick_check(tmp_path: Path, name: str) -> None:
    folder = copy_of_good(tmp_path)
    good = (folder / name).read_bytes()
    for offset in range(0, 4096, 37):
        flip(folder / name, offset)
        assert [p.file for p in problems(folder, read_data=False)] == [name], offset
        (folder / name).write_bytes(good)


def test_filler_that_is_not_zero_is_found(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    flip(folder / LAYER, 4096 + 8064 + 100)
    (problem,) = problems(folder)
    assert "layer 0 expert 0 at offset 4096: the filler after it is not zero" in problem.message
    assert (problem.layer, problem.expert, problem.offset) == (0, 0, 4096)


def test_every_byte_of_a_layer_file_is_covered(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    good = (folder / LAYER).read_bytes()
    for offset in range(0, len(good), 211):
        flip(folder / LAYER, offset)
        assert len(problems(folder)) == 1, offset
        (folder / LAYER).write_bytes(good)


@pytest.mark.parametrize("read_data", [False, True])
@pytest.mark.parametrize("name", [LAYER, "trunk.safetensors", "LICENSE"])
def test_missing_file_is_reported_and_the_rest_is_checked(
    tmp_path: Path, name: str, read_data: bool
) -> None:
    folder = copy_of_good(tmp_path)
    (folder / name).unlink()
    report = verify_folder(folder, read_data=read_data)
    assert {p.file for p in report.problems} == {name}
    assert f"file {name} is missing" in report.problems[0].message
    experts = [(p.layer, p.expert, p.offset) for p in report.problems if p.expert is not None]
    index = Artifact.open(VECTORS / "folder").index
    assert experts == [
        (e.layer, e.expert, e.offset) for e in index.layers[0].experts if name == LAYER
    ]
    assert (report.checked_bytes > 0) == read_data


@pytest.mark.parametrize("name", ["moe_index.json", "config.json"])
def test_missing_head_file_is_reported(tmp_path: Path, name: str) -> None:
    folder = copy_of_good(tmp_path)
    (folder / name).unlink()
    (problem,) = problems(folder)
    assert f"file {name} is missing" in problem.message


def test_every_problem_is_reported_not_only_the_first(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", config={**CONFIG, "num_hidden_layers": 3})
    cut(folder / LAYER, 9000)
    flip(folder / "experts/layer-001.safetensors", 5000)
    flip(folder / "experts/layer-001.safetensors", 13000)
    (folder / "LICENSE").unlink()
    found = [(p.file, p.expert) for p in problems(folder)]
    layer_1 = "experts/layer-001.safetensors"
    assert found == [
        (LAYER, None),
        (LAYER, 0),
        (LAYER, 1),
        ("LICENSE", None),
        (layer_1, 0),
        (layer_1, 1),
    ]


def test_problem_of_the_index_is_blamed_on_the_index(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    spoil(
        folder, {"file": "moe_index.json", "at": "/layers/0/experts/1/offset", "json": str(2**52)}
    )
    assert [p.file for p in problems(folder)] == ["moe_index.json"]


def test_damaged_xxh3_of_a_good_expert_is_blamed_on_the_index(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    spoil(
        folder,
        {"file": "moe_index.json", "at": "/layers/0/experts/1/xxh3", "json": f'"{"0" * 32}"'},
    )
    (problem,) = problems(folder)
    assert problem.file == "moe_index.json"
    assert "layer 0 expert 1: xxh3 is " in problem.message
    rebuild_index(folder)
    assert problems(folder) == []


def test_problem_of_config_is_blamed_on_config(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    spoil(folder, {"file": "config.json", "at": "/vocab_size", "json": "9"})
    assert [p.file for p in problems(folder)] == ["config.json"]


def test_folder_that_is_not_there_is_an_error_not_a_report(tmp_path: Path) -> None:
    with pytest.raises(MoeConvertError, match="is not a folder"):
        verify_folder(tmp_path / "nowhere")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = verify_folder(
        copy_of_good(tmp_path),
        read_data=True,
        progress=lambda *call: calls.append(call),
    )
    assert calls[-1] == ("verifying", report.checked_bytes, report.checked_bytes)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})


def test_experts_behind_a_cut_are_named(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    entry = Artifact.open(folder).entry(0, 1)
    cut(folder / LAYER, entry.offset + 100)
    first, second = problems(folder, read_data=False)
    assert first.expert is None
    assert (second.layer, second.expert, second.offset) == (0, 1, entry.offset)
    assert f"layer 0 expert 1 at offset {entry.offset}: is missing" in second.message


def test_damage_comes_with_the_command_that_mends_it(tmp_path: Path) -> None:
    folder = copy_of_good(tmp_path)
    flip(folder / LAYER, 5000)
    (problem,) = problems(folder)
    assert problem.hint.startswith(f"moe-convert repair {folder} --from ")


def test_a_sample_is_the_same_for_the_same_seed_and_all_seeds_see_everything(
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path / "f", config={**CONFIG, "num_hidden_layers": 4})
    flip(folder / LAYER, 5000)

    def run(seed: int) -> tuple[int, int]:
        report = verify_folder(folder, read_data=True, sample=Sample(0.2, seed))
        return len(report.problems), report.checked_bytes

    whole = verify_folder(folder, read_data=True).checked_bytes
    runs = [run(seed) for seed in range(40)]
    assert runs == [run(seed) for seed in range(40)]
    assert {n for n, _ in runs} == {0, 1}
    assert all(0 < checked < whole for _, checked in runs)
