"""The commands over model types that go through transformers' own layers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_models import write_checkpoint

from loader.traces.trace import read_trace

TEXT = "Once upon a time there was a model with experts. " * 60
Run = Callable[..., tuple[int, str, str]]
NAMES = ("qwen3_moe with dense layers", "olmoe")
LAYERS = {"qwen3_moe with dense layers": 3, "olmoe": 3}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, example_folder: Path
) -> Callable[[str], tuple[Path, Path]]:
    """name -> (checkpoint with a tokenizer, its conversion at 2 bits)."""
    from converter.convert import convert_checkpoint
    from converter.recipe.recipes import make_recipe

    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("typed")
            source = write_checkpoint(folder / "source", name, fused=False, vocab_size=4096)
            for file in example_folder.glob("*token*"):
                shutil.copy(file, source)
            convert_checkpoint(source, folder / "out", make_recipe("2bit", calibrate="none"))
            made[name] = source, folder / "out"
        return made[name]

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def value_of(run_command: Run, *arguments: Any) -> Any:
    code, out, err = run_command(*map(str, arguments), "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_and_plan_say_sizes_of_the_experts(
    folders: Any, run_command: Run, name: str
) -> None:
    source, out = folders(name)
    facts = value_of(run_command, "inspect", out)
    assert facts["architecture"]["model_type"] == name.split()[0]
    assert len(facts["architecture"]["expert_modules"]) == LAYERS[name]
    ours, theirs = (value_of(run_command, "plan", path, "--ram", "1GiB") for path in (out, source))
    assert ours["experts"] == theirs["experts"] == facts["architecture"]["num_local_experts"]


@pytest.mark.parametrize("name", NAMES)
def test_traces_of_model_and_checkpoint_replay(
    folders: Any, run_command: Run, text: Path, tmp_path: Path, name: str
) -> None:
    for number, path in enumerate(folders(name)):
        file = tmp_path / f"{number}.zst"
        value_of(
            run_command,
            "trace",
            path,
            "--text",
            text,
            "--window",
            64,
            "--max-tokens",
            128,
            "-o",
            file,
        )
        trace = read_trace(file)
        assert trace.experts.shape[:2] == (128, LAYERS[name])
        assert trace.header.architecture.model_type == name.split()[0]
        assert value_of(run_command, "replay", file)["layers"] == LAYERS[name]
    first, second = (read_trace(tmp_path / f"{number}.zst") for number in range(2))
    assert (first.experts[:, 0] == second.experts[:, 0]).mean() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_eval_and_generate_run(folders: Any, run_command: Run, text: Path, name: str) -> None:
    source, out = folders(name)
    for path in (source, out):
        value_of(run_command, "eval", path, "--text", text, "--window", 64, "--max-windows", 2)
    found = value_of(
        run_command,
        "generate",
        out,
        "--prompt",
        "Once",
        "--max-new-tokens",
        8,
        "--ram-cache",
        "1MiB",
    )
    assert found
