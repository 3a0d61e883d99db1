"""repair as a user calls it: from the published model, and from the source checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged_files import flip
from hub_server import HubServer

from converter.convert import ConvertOptions, convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.reading.verify import verify_folder

REPO = "me/tiny-2bit"
LAYER_1 = "experts/layer-001.safetensors"
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("time.sleep", lambda s: None)

    def call(command: str, *args: object) -> tuple[int, dict[str, Any], str]:
        code, out, err = run_command(command, *args, "--json", "-q")
        return code, json.loads(out) if out else {}, err

    return call


def damage(folder: Path, *places: tuple[int, int]) -> None:
    artifact = Artifact.open(folder)
    for layer, expert in places:
        flip(folder / artifact.index.layers[layer].file, artifact.entry(layer, expert).offset + 11)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def feedback(example_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, converted with calibration, compressed."""
    out = tmp_path_factory.mktemp("feedback") / "out"
    recipe = make_recipe("2bit", solver="feedback", calibrate="random", calibration_tokens=1024)
    convert_checkpoint(example_folder, out, recipe, ConvertOptions(codec="zstd"))
    return out


def test_verify_says_which_command_mends(
    converted_copy: Path, run: Run, example_folder: Path
) -> None:
    damage(converted_copy, (1, 2))
    code, facts, _ = run("verify", converted_copy, "--read-data")
    assert code == 3
    (problem,) = facts["problems"]
    assert (problem["layer"], problem["expert"], problem["file"]) == (1, 2, LAYER_1)
    assert problem["hint"].startswith(f"moe-convert repair {converted_copy} --from SOURCE")
    assert run("repair", converted_copy, "--from", example_folder)[0] == 0
    assert run("verify", converted_copy, "--read-data")[0] == 0


def test_experts_come_from_where_it_was_published(
    hub: HubServer, converted: Callable[[str], Path], converted_copy: Path, run: Run
) -> None:
    hub.add(REPO, converted("2bit"))
    damage(converted_copy, (0, 1), (1, 2))
    code, facts, _ = run("repair", converted_copy, "--from", REPO)
    assert (code, facts["experts"]) == (0, [[0, 1], [1, 2]])
    assert contents(converted_copy) == contents(converted("2bit"))


@pytest.mark.parametrize("name", ["moe_index.json", "config.json", "tokenizer.json"])
def test_a_lost_file_comes_from_where_it_was_published(
    hub: HubServer, converted: Callable[[str], Path], converted_copy: Path, run: Run, name: str
) -> None:
    hub.add(REPO, converted("2bit"))
    (converted_copy / name).unlink()
    assert run("repair", converted_copy, "--from", REPO)[0] == 0
    assert contents(converted_copy) == contents(converted("2bit"))


def test_experts_and_trunk_are_converted_again(
    converted: Callable[[str], Path], converted_copy: Path, run: Run, example_folder: Path
) -> None:
    damage(converted_copy, (0, 1), (1, 2))
    flip(converted_copy / "trunk.safetensors", 9000)
    (converted_copy / "tokenizer.json").unlink()
    code, facts, _ = run("repair", converted_copy, "--from", example_folder)
    assert (code, facts["experts"]) == (0, [[0, 1], [1, 2]])
    assert contents(converted_copy) == contents(converted("2bit"))


def test_calibrated_and_compressed_experts_are_converted_again(
    feedback: Path, tmp_path: Path, run: Run, example_folder: Path
) -> None:
    folder = Path(shutil.copytree(feedback, tmp_path / "copy"))
    damage(folder, (1, 3))
    flip(folder / "trunk.safetensors", 9000)
    code, facts, _ = run("repair", folder, "--from", example_folder)
    assert (code, facts["experts"]) == (0, [[1, 3]])
    assert contents(folder) == contents(feedback)


def test_a_source_on_the_hub_is_read_by_ranges(
    hub: HubServer,
    converted: Callable[[str], Path],
    converted_copy: Path,
    run: Run,
    example_folder: Path,
) -> None:
    hub.add("me/tiny", example_folder)
    damage(converted_copy, (1, 2))
    assert run("repair", converted_copy, "--from", "me/tiny")[0] == 0
    assert contents(converted_copy) == contents(converted("2bit"))
    assert (
        hub.served("model-0")
        < sum(p.stat().st_size for p in example_folder.glob("*.safetensors")) / 4
    )


def test_another_checkpoint_is_refused_and_the_folder_stays(
    converted_copy: Path, run: Run, example_folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(example_folder, tmp_path / "source"))
    shard = next(source.glob("*-00001-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[100_000:] = b"\x11" * (len(data) - 100_000)
    shard.write_bytes(data)
    every = [
        (layer.experts[0].layer, e.expert)
        for layer in Artifact.open(converted_copy).index.layers[:1]
        for e in layer.experts
    ]
    damage(converted_copy, *every)
    before = contents(converted_copy)
    code, _, err = run("repair", converted_copy, "--from", source)
    assert code == 1
    assert "another checkpoint" in err
    assert contents(converted_copy) == before


def test_without_an_origin_the_command_is_named(converted_copy: Path, run: Run) -> None:
    damage(converted_copy, (1, 2))
    code, _, err = run("repair", converted_copy)
    assert code == 3
    assert f"moe-convert repair {converted_copy} --from" in err


def test_an_index_is_rebuilt(
    converted_copy: Path, converted: Callable[[str], Path], run: Run
) -> None:
    path = converted_copy / "moe_index.json"
    value = json.loads(path.read_bytes())
    del value["layers"]
    path.write_text(json.dumps(value))
    assert run("repair", converted_copy)[0] == 3
    assert run("repair", converted_copy, "--index")[0] == 0
    assert contents(converted_copy) == contents(converted("2bit"))


def test_a_subset_finds_damage_for_some_seeds_and_names_them(
    converted_copy: Path, run: Run
) -> None:
    damage(converted_copy, (0, 0))
    found = {
        seed: run("verify", converted_copy, "--read-data-subset", "20%", "--seed", seed)[0]
        for seed in range(12)
    }
    assert set(found.values()) == {0, 3}
    code, facts, _ = run("verify", converted_copy, "--read-data-subset", "20%")
    assert (
        run("verify", converted_copy, "--read-data-subset", "20%", "--seed", facts["seed"])[0]
        == code
    )


@pytest.mark.parametrize(
    "options", [["--read-data-subset", "0%"], ["--read-data-subset", "5"], ["--seed", "1"]]
)
def test_wrong_subsets_are_usage_errors(converted_copy: Path, run: Run, options: list[str]) -> None:
    assert run("verify", converted_copy, *options)[0] == 2


def test_a_repaired_folder_verifies(hub: HubServer, converted_copy: Path, run: Run) -> None:
    hub.add(REPO, contents(converted_copy))
    (converted_copy / LAYER_1).unlink()
    assert run("repair", converted_copy, "--from", REPO)[0] == 0
    assert verify_folder(converted_copy, read_data=True).problems == []
