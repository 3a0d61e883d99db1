"""Runs lm-eval's benchmarks (extra [eval]) on a loaded model."""

import importlib
from pathlib import Path
from typing import Any

from formats.errors import MoeConvertError, RecipeError
from formats.install import install_extra


def check_tasks(tasks: list[str], folder: Path | None) -> Any:
    """Return lm-eval's `TaskManager`, which knows all of `tasks`.

    folder: folder with more task definitions. Raises MoeConvertError if lm-eval is not installed,
    RecipeError if it does not know a task.
    """
    try:
        importlib.import_module("lm_eval.models.huggingface")
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise MoeConvertError(f"--tasks needs lm-eval: {e}", install_extra("eval")) from None
    manager = TaskManager(include_path=folder and str(folder))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise RecipeError(
            f"lm-eval has no task {', '.join(unknown)}",
            "lm-eval ls tasks  # list the tasks; --task-folder adds your own",
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
    """Run `tasks` and return task or group -> metric -> value.

    Metrics have lm-eval's names, such as "acc" and "acc_stderr"; a filter stands behind a comma
    ("exact_match,strict").

    batch: documents in one forward pass.
    chat: True puts documents into the tokenizer's chat template. The template writes BOS, so
    lm-eval adds none.
    limit: documents per task; None runs all.
    folder: folder with more task definitions (YAML). They may name Python code, which lm-eval runs.

    lm-eval downloads missing data sets from the Hub. Raises MoeConvertError if lm-eval is not
    installed or finds no data, RecipeError if it does not know a task.
    """
    manager = check_tasks(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    options = {"add_bos_token": False} if chat else {}
    try:
        evaluation = simple_evaluate(
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
            "connect to the Hub: lm-eval downloads a data set when it is used for the first time",
        ) from e
    results: dict[str, dict[str, Any]] = evaluation["results"]
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, float)
        }
        for task, metrics in results.items()
    }
