"""Benchmarks by lm-eval, on a local task; without lm-eval only the refusals run."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import loader
from converter.cli.main import main

needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="needs the extra [eval]"
)

DOCUMENTS: list[dict[str, Any]] = [
    {"question": "So Jonah arose, and went to", "choices": ["Nineveh", "def"], "label": 0},
    {"question": "import os\nimport", "choices": ["Yahweh", "sys"], "label": 1},
    {"question": "So Jonah arose, and went to", "choices": ["the", "Verzeichnis"], "label": 1},
    {"question": "Ouvrez le menu", "choices": ["contextuel", "Yahweh"], "label": 0},
]

TASK = """
task: letters_of_ours
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/documents.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@torch.inference_mode()
def likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    ids = torch.tensor(tokenizer(f"{question} {choice}")["input_ids"])
    begin = len(tokenizer(question)["input_ids"])
    logs = torch.log_softmax(model(input_ids=ids[None]).logits[0].float(), -1)
    return float(logs[begin - 1 : -1].gather(1, ids[begin:, None]).sum())


@needs_lm_eval
@pytest.mark.parametrize("limit", [None, 3])
def test_accuracy_is_the_share_of_documents_whose_right_choice_is_likelier(
    run: Any, converted: Callable[[str], Path], task_folder: Path, limit: int | None
) -> None:
    folder = converted("2bit")
    options = [
        "--tasks",
        "letters_of_ours",
        "--task-folder",
        task_folder,
        "--kernels",
        "torch",
        "--json",
    ]
    code, out, _ = run(folder, *options, *(["--limit", limit] if limit else []))
    model, tokenizer = (
        loader.from_pretrained(folder, kernels="torch"),
        loader.load_tokenizer(folder),
    )
    right = [
        max((0, 1), key=lambda c: likelihood(model, tokenizer, d["question"], d["choices"][c]))
        == d["label"]
        for d in DOCUMENTS[:limit]
    ]
    assert code == 0
    assert 0 < sum(right) < len(right)
    assert json.loads(out)["tasks"]["letters_of_ours"]["acc"] == pytest.approx(
        sum(right) / len(right)
    )


@needs_lm_eval
def test_unknown_task_is_named(
    run: Any, converted: Callable[[str], Path], task_folder: Path
) -> None:
    code, _, err = run(
        converted("2bit"),
        "--tasks",
        "no_such_task",
        "--task-folder",
        task_folder,
        "--kernels",
        "torch",
    )
    assert code == 2
    assert "lm-eval has no task no_such_task" in err


@pytest.mark.parametrize(("options", "chat"), [([], True), (["--raw"], False)])
def test_documents_go_through_the_template_with_no_bos_before_it(
    run: Any, templated: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], chat: bool
) -> None:
    """A stand-in for lm-eval records its arguments."""
    told: dict[str, Any] = {}

    def evaluate(model: Any, **arguments: Any) -> dict[str, Any]:
        told.update(arguments)
        return {"results": {"letters": {"acc,none": 0.5}}}

    manager = SimpleNamespace(all_tasks=["letters"])
    modules: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": evaluate, "__spec__": SimpleNamespace()},
        "lm_eval.tasks": {"TaskManager": lambda **_: manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **arguments: told.update(arguments)},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    code, out, err = run(
        templated, "--tasks", "letters", "--kernels", "torch", "--check", "none", "--json", *options
    )
    assert code == 0, err
    assert json.loads(out)["chat_template"] == told["apply_chat_template"] == chat
    assert told.get("add_bos_token", True) != chat
    assert ("chat template" in err) == chat


def test_without_lm_eval_the_extra_is_named(
    run: Any, converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run(converted("2bit"), "--tasks", "arc_easy", "--kernels", "torch")
    assert code == 1
    assert "pip install 'moe-convert[eval]'" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "either --text or --tasks"),
        (["--text", "{text}", "--tasks", "a"], "either --text or --tasks"),
        (["--tasks", "a", "--against", "b"], "--against compares on texts"),
        (["--tasks", "a", "--save"], "--save needs --against"),
        (["--text", "{text}", "--limit", "3"], "need --tasks"),
        (["--text", "{text}", "--raw"], "need --tasks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    run: Any, example_folder: Path, options: list[str], said: str
) -> None:
    text = example_folder.parent / "text" / "english.txt"
    code, _, err = run(example_folder, *(option.format(text=text) for option in options))
    assert code == 2
    assert said in err
