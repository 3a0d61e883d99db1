"""eval --against: zero against itself, the known order of recipes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from converter.cli.main import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def text(example_folder: Path) -> Path:
    return example_folder.parent / "text" / "english.txt"


def test_model_against_itself_differs_in_nothing(run: Any, example_folder: Path, text: Path) -> None:
    code, out, _ = run(example_folder, "--against", example_folder, "--text", text, "--max-windows", 2, "--json")
    overall = json.loads(out)["texts"][-1]
    assert code == 0
    assert (overall["kl"], overall["ratio"], overall["agreement"]) == (0, 1, 1)
    assert overall["routers"] == [1.0] * 8


def test_fewer_bits_are_further_away(run: Any, converted: Any, example_folder: Path, text: Path) -> None:
    kls = []
    for recipe in ("4bit", "2bit"):
        options = ["--text", text, "--max-windows", 4, "--kernels", "torch", "--json"]
        overall = json.loads(run(converted(recipe), "--against", example_folder, *options)[1])["texts"][-1]
        assert overall["tokens"] == 4 * 255
        assert len(overall["routers"]) == 8 and 0.8 < min(overall["routers"]) < 1
        kls.append(overall["kl"])
    assert 0 < kls[0] < 0.5 * kls[1] < 0.02


def test_table_has_each_text_and_overall(run: Any, converted: Any, example_folder: Path, text: Path) -> None:
    options = ["--text", text, "--max-windows", 2, "--window", 64, "--kernels", "torch"]
    code, out, _ = run(converted("2bit"), "--against", example_folder, *options)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["text", "english.txt", "overall"]


def test_original_must_be_there(run: Any, converted: Any, text: Path, tmp_path: Path) -> None:
    code, _, err = run(converted("2bit"), "--against", tmp_path / "none", "--text", text)
    assert code == 1
    assert "is not a folder" in err
