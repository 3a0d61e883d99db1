"""convert and inspect of mixed bits as a user calls them."""

import json
from pathlib import Path
from typing import Any

import pytest
from convert_fixtures import run, source

__all__ = ["run", "source"]


def test_what_a_dry_run_says_is_what_is_written(run: Any, source: Path, tmp_path: Path) -> None:
    options = (
        "convert",
        source,
        "-o",
        tmp_path / "out",
        "--solver",
        "hqq",
        "--layer-bits",
        "0=3bit,1:2/down=4bit",
        "--json",
    )
    planned = json.loads(run(*options, "--dry-run")[1])
    code, text, _ = run(*options)
    done = json.loads(text)
    assert (code, done["recipe"]) == (0, "custom")
    assert done["layer_bits"] == ["0=tile32-q3-g32-s4", "1:2/down=tile32-q4-g64-s8"]
    sizes = ("converted_bytes", "expert_bits", "expert_bytes", "layer_bits")
    assert [planned[name] for name in sizes] == [done[name] for name in sizes]
    shown = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert shown["expert_bits"] == done["expert_bits"]
    text = run("inspect", tmp_path / "out")[1]
    assert "tile32-q2-g16-s4 (4 of 8 experts), tile32-q3-g32-s4 (4 of 8 experts)" in text


def test_a_target_is_met_and_its_layers_named(run: Any, source: Path, tmp_path: Path) -> None:
    options: list[Any] = [
        "convert",
        source,
        "-o",
        tmp_path / "out",
        "--target-bpw",
        "10.5",
        "--json",
    ]
    options += [
        "--json",
        "--solver",
        "feedback",
        "--calibrate",
        "random",
        "--calibration-tokens",
        "1024",
    ]
    assert json.loads(run(*options, "--dry-run")[1])["layer_bits"] == ["chosen by calibration"]
    done = json.loads(run(*options)[1])
    assert done["expert_bits"] <= 10.5
    assert done["recipe"] == "10.5bpw"
    assert all("=tile32-q" in rule for rule in done["layer_bits"])
    again = json.loads(run(*options)[1])
    assert (again["done"], again["layer_bits"]) == ("already complete", done["layer_bits"])


def test_a_recipe_may_be_a_file_that_options_change(run: Any, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"name": "3bit", "solver": "hqq", "rules": ["0=2bit"]}')
    _, text, _ = run(
        "convert", source, "--recipe", file, "--layer-bits", "1/down=4bit", "--dry-run", "--json"
    )
    facts = json.loads(text)
    assert facts["layer_bits"] == ["0=tile32-q2-g16-s4", "1/down=tile32-q4-g64-s8"]
    assert facts["solver"] == "hqq"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layer-bits", "7=3bit"), "there is no layer 7, the last is 1"),
        (("--layer-bits", "0=5bit"), "'5bit' is unknown"),
        (("--target-bpw", "2.7", "--solver", "feedback"), "bits per weight"),
        (("--target-bpw", "11", "--layer-bits", "0=3bit"), "one of them"),
        (("--recipe", "none.json"), "none.json"),
        (("--down-width", "100", "--solver", "feedback"), "down-width 100"),
    ],
)
def test_what_cannot_be_is_a_usage_error(
    run: Any, source: Path, options: tuple[str, ...], words: str
) -> None:
    code, _, err = run("convert", source, *options, "--dry-run")
    assert code == 2
    assert words in err
