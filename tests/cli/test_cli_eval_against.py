"""eval --against: zero against itself, the known order of recipes, saved results, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import SHAPES, Shape, make_checkpoint

from formats.quality import read_quality


@pytest.fixture
def run(run_command: Any) -> Any:
    def call(*arguments: object, command: str = "eval") -> tuple[int, str, str]:
        return run_command(command, *arguments)

    return call


@pytest.fixture
def text(example_folder: Path) -> Path:
    return example_folder.parent / "text" / "english.txt"


def test_model_against_itself_differs_in_nothing(
    run: Any, example_folder: Path, text: Path
) -> None:
    code, out, _ = run(
        example_folder, "--against", example_folder, "--text", text, "--max-windows", 2, "--json"
    )
    overall = json.loads(out)["overall"]
    assert code == 0
    assert (overall["kl"], overall["ratio"], overall["agreement"]) == (0, 1, 1)
    assert overall["routers"] == [1.0] * 8
    assert overall["perplexity"] == overall["original_perplexity"]


def test_fewer_bits_are_further_away(
    run: Any, converted: Any, example_folder: Path, text: Path
) -> None:
    kls = []
    for recipe in ("4bit", "2bit"):
        options = ["--text", text, "--max-windows", 4, "--kernels", "torch", "--json"]
        overall = json.loads(run(converted(recipe), "--against", example_folder, *options)[1])[
            "overall"
        ]
        assert overall["tokens"] == 4 * 255
        assert len(overall["routers"]) == 8 and 0.8 < min(overall["routers"]) < 1
        kls.append(overall["kl"])
    assert 0 < kls[0] < 0.5 * kls[1] < 0.02


def test_both_perplexities_are_those_measured_alone(
    run: Any, converted: Any, example_folder: Path, text: Path
) -> None:
    options = ["--text", text, "--max-windows", 3, "--batch", 2, "--kernels", "torch", "--json"]
    found = json.loads(run(converted("2bit"), "--against", example_folder, *options)[1])["overall"]
    ours = json.loads(run(converted("2bit"), *options)[1])["overall"]["perplexity"]
    theirs = json.loads(run(example_folder, *options)[1])["overall"]["perplexity"]
    assert found["perplexity"] == pytest.approx(ours, rel=1e-4)
    # bfloat16 by transformers, float32 here.
    assert found["original_perplexity"] == pytest.approx(theirs, rel=0.005)
    assert found["ratio"] == pytest.approx(found["perplexity"] / found["original_perplexity"])


def test_table_has_each_text_overall_and_every_layers_router(
    run: Any, converted: Any, example_folder: Path, text: Path
) -> None:
    options = ["--text", text, "--max-windows", 1, "--window", 64, "--kernels", "torch"]
    code, out, err = run(converted("2bit"), "--against", example_folder, *options)
    table, _, layers = out.partition("\n\n")
    assert code == 0
    assert [line.split()[0] for line in table.splitlines()] == ["text", "english.txt", "overall"]
    assert len(layers.partition(":")[2].split()) == 8
    assert "layer 8 of 8" in err


def test_saved_evaluation_is_what_was_printed_and_inspect_shows_it(
    run: Any, converted_copy: Path, example_folder: Path, text: Path
) -> None:
    options = ["--text", text, "--max-windows", 2, "--window", 64, "--kernels", "torch"]
    code, out, _ = run(converted_copy, "--against", example_folder, *options, "--save", "--json")
    printed = json.loads(out)
    quality = read_quality(converted_copy)
    assert code == 0
    assert quality and quality.evaluation
    saved = quality.evaluation
    assert (saved.original, saved.window, saved.overall.kl) == (
        "tiny-mixtral",
        64,
        printed["overall"]["kl"],
    )
    assert saved.versions.keys() == {"moe-convert", "torch", "transformers", "kernels"}
    assert saved.versions["torch"] == torch.__version__
    shown = run(converted_copy, command="inspect")[1]
    assert f"KL {saved.overall.kl:.5f}" in shown and "tiny-mixtral" in shown
    assert (
        json.loads(run(converted_copy, "--json", command="inspect")[1])["evaluation"]["window"]
        == 64
    )
    assert run(converted_copy, "--read-data", command="verify")[0] == 0


def test_nothing_is_saved_unless_asked_for(
    run: Any, converted: Any, example_folder: Path, text: Path
) -> None:
    options = ["--text", text, "--max-windows", 1, "--window", 64, "--kernels", "torch"]
    before = (converted("2bit") / "quality.json").read_bytes()
    assert run(converted("2bit"), "--against", example_folder, *options)[0] == 0
    assert (converted("2bit") / "quality.json").read_bytes() == before
    code, _, err = run(example_folder, "--against", example_folder, *options, "--save")
    assert code == 2 and "not a converted folder" in err


def test_original_must_be_there_and_not_quantized(
    run: Any, converted: Any, text: Path, tmp_path: Path
) -> None:
    code, _, err = run(converted("2bit"), "--against", tmp_path / "none", "--text", text)
    assert code == 1 and "is not a folder" in err
    code, _, err = run(converted("2bit"), "--against", converted("2bit"), "--text", text)
    assert code == 1 and "converted already" in err


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (SHAPES["mini"], "hidden_size is 64, but in {} it is 192"),
        (Shape(192, 384, 6, 2, vocabulary=4000), "vocab_size is 4000, but in {} it is 4096"),
    ],
)
def test_original_of_another_shape_is_refused_with_both_numbers(
    run: Any, converted: Any, text: Path, tmp_path: Path, shape: Shape, said: str
) -> None:
    make_checkpoint(tmp_path / "other", shape, 8)
    code, _, err = run(converted("2bit"), "--against", tmp_path / "other", "--text", text)
    assert code == 1
    assert f"{tmp_path / 'other'}: {said.format(converted('2bit'))}" in err


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    run: Any, converted: Any, example_folder: Path, text: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(example_folder, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = run(converted("2bit"), "--against", other, "--text", text, "--max-windows", 1)
    assert code == 1
    assert "english.txt: token " in err
    assert f"tokenizer in {other}" in err and f"the one in {converted('2bit')}" in err


def test_an_original_without_tokenizer_is_named(
    run: Any, converted: Any, example_folder: Path, text: Path, tmp_path: Path
) -> None:
    other = Path(
        shutil.copytree(
            example_folder, tmp_path / "other", ignore=shutil.ignore_patterns("tokenizer*")
        )
    )
    code, _, err = run(converted("2bit"), "--against", other, "--text", text, "--max-windows", 1)
    assert code == 1
    assert f"{other}: has no tokenizer" in err
