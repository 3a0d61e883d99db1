"""Benchmarks by lm-eval (the extra [eval]): multiple choice, generation and so on, on the model
object as it is.
"""

import importlib
from pathlib import Path
from typing import Any

from formats.errors import MoeConvertError, RecipeError


def check_tasks(tasks: list[str], folder: Path | None) -> Any:
    """lm-eval's manager of tasks. MoeConvertError without lm-eval, RecipeError if it lacks one of
    `tasks`.
    """
    try:
        importlib.import_module("lm_eval.models.huggingface")
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise MoeConvertError(
            f"tasks need lm-eval: {e}", "pip install 'moe-convert[eval]'"
        ) from None
    manager = TaskManager(include_path=folder and str(folder))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise RecipeError(
            f"lm-eval has no task {', '.join(unknown)}",
            "lm-eval ls tasks  # lists them; --task-folder adds your own",
        )
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    *,
    batch: int,
    chat: bool = False,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Task or group → metric → value, as lm-eval names them: "acc", "acc_stderr", a filter behind a
    comma if there is one ("exact_match,strict").

    chat: documents go through the tokenizer's chat template, which writes BOS itself; lm-eval then
    adds none.
    limit: only so many documents a task. folder: of further task definitions (YAML; they may name
    Python code, which lm-eval runs). Data sets that are not on this machine are fetched from the
    Hub. MoeConvertError if lm-eval is not installed or has no data, RecipeError if it knows no such
    task.
    """
    manager = check_tasks(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    options = {"add_bos_token": False} if chat else {}
    try:
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, **options),
            apply_chat_template=chat,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except OSError as e:
        raise MoeConvertError(
            f"{', '.join(tasks)}: lm-eval: {e}",
            "data sets are fetched from the Hub, the first time they are used",
        ) from e
    results: dict[str, dict[str, Any]] = found["results"]
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, float)
        }
        for task, metrics in results.items()
    }
