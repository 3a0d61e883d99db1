"""Calibration texts and options: the builtin text, a file, and refusals."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from calibrated_runs import convert
from make_checkpoint import SHAPES, make_checkpoint
from project_paths import ROOT

from converter.calibration.calibration_text import calibration_tokens
from converter.checkpoint.source import Checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import RecipeError, SourceError

pytestmark = pytest.mark.usefixtures("reference_solver")


@pytest.mark.parametrize(
    ("data", "word"),
    [(b"", "is empty"), (b"too short", "are needed"), (b"caf\xe9 " * 9000, "not UTF-8 at byte 3")],
)
def test_bad_text_is_named(source: Path, tmp_path: Path, data: bytes, word: str) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(data)
    with pytest.raises(SourceError, match=word):
        convert(source, tmp_path / "out", {"calibrate": "file"}, calibration_file=text)
    with pytest.raises(SourceError, match="No such file"):
        convert(
            source, tmp_path / "out", {"calibrate": "file"}, calibration_file=tmp_path / "none.txt"
        )


def test_checkpoint_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "mini"
    make_checkpoint(folder, SHAPES["mini"], 1)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(SourceError, match=r"tokenizer(?s:.*)--calibrate random"):
        convert(folder, tmp_path / "out", {"calibrate": "builtin"})
    assert convert(folder, tmp_path / "out2", {"calibrate": "random"}) == "converted"


def test_text_that_is_unknown_to_the_tokenizer_is_refused(tmp_path: Path) -> None:
    folder, text = tmp_path / "mini", tmp_path / "text.txt"
    make_checkpoint(folder, SHAPES["mini"], 1)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    unknown = tokenizer["model"]["vocab"]["<unk>"]
    tokenizer["model"] |= {"byte_fallback": False, "unk_token": "<unk>", "fuse_unk": False}
    tokenizer["model"]["vocab"] = {
        t: i for t, i in tokenizer["model"]["vocab"].items() if t.isascii() or i <= unknown
    }
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    text.write_text("漢字かな" * 3000)
    with pytest.raises(SourceError, match=r"% of .*text.txt is unknown"):
        convert(folder, tmp_path / "out", {"calibrate": "file"}, calibration_file=text)


def test_builtin_text_is_in_the_source_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"converter/data/calibration.txt.zst", "converter/data/README.md"} <= names


def test_builtin_text_is_enough_for_the_default_and_has_several_kinds(example_folder: Path) -> None:
    with Checkpoint(example_folder) as checkpoint:
        tokens = calibration_tokens(checkpoint, "builtin", 8192)
        again = calibration_tokens(checkpoint, "builtin", 8192)
    assert tokens.windows.numel() == 8192
    assert tokens.sha256 == again.sha256
    assert (tokens.windows[:, 0] == 1).all()
    assert float(tokens.weights.mean()) == pytest.approx(1)


def test_builtin_text_shares_nothing_with_the_example_texts(example_folder: Path) -> None:
    from converter.calibration.calibration_text import _read

    _, text = _read("builtin", None)
    lines = {line.strip() for line in text.splitlines() if len(line.strip()) > 40}
    for file in (example_folder.parent / "text").glob("*.txt"):
        assert lines.isdisjoint(line.strip() for line in file.read_text().splitlines())
    assert 200_000 < len(text.encode()) < 500_000
    assert hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"solver": "hqq", "calibrate": "builtin"}, "uses no calibration"),
        ({"solver": "refit", "calibration_tokens": 8192}, "uses no calibration"),
        ({"solver": "feedback", "calibrate": "none"}, "needs calibration"),
        ({"calibrate": "builtin", "calibration_tokens": 512}, "512"),
        ({"calibrate": "poetry"}, "poetry"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        make_recipe("2bit", **options)


def test_calibration_and_the_solver_imply_each_other() -> None:
    assert make_recipe("2bit", calibrate="random").solver == "feedback"
    assert make_recipe("2bit", solver="feedback").recorded.options == {
        "calibrate": "builtin",
        "calibration_tokens": 8192,
    }
    assert make_recipe("2bit", calibrate="none").recorded.options == {}


def test_command_takes_a_file_and_says_what_it_did(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from converter.cli.main import main

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(2000)))
    command = [
        "convert",
        source,
        "-o",
        tmp_path / "out",
        "--calibrate",
        text,
        "--calibration-tokens",
        1024,
        "--json",
    ]
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, command), "--dry-run"])
    needed = json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as exit_:
        main(list(map(str, command)))
    facts = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert (facts["solver"], facts["calibration"], facts["done"]) == (
        "feedback",
        "file",
        "converted",
    )
    assert needed["memory_bytes"] > 0
