"""`moe-convert eval`: measures perplexity, the difference to the original, or benchmarks."""

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from converter.cli.options import shared_options
from converter.cli.options.early_checks import check_out_file, require_extra
from converter.cli.show.console import Output, output_options
from converter.cli.show.tables import table
from formats.install import install_extra
from formats.quality import Evaluation


@click.command(
    "eval",
    epilog="""\b
Examples:
  moe-convert eval mixtral-2bit --text examples/text/english.txt
  moe-convert eval ./Mixtral-8x7B-v0.1 --text a.txt --window 512 --json
  moe-convert eval mixtral-2bit --text a.txt --max-windows 4
  moe-convert eval mixtral-2bit --text a.txt --against ./original --save
  moe-convert eval mixtral-2bit --tasks arc_easy,winogrande --limit 100""",
)
@click.argument("path", type=click.Path(path_type=Path))
@shared_options.texts
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="ORIGINAL",
    help="Compare with the checkpoint in this folder. It is computed layer by layer and need not"
    " fit in memory.",
)
@shared_options.adapters
@click.option("--save", is_flag=True, help="With --against: save the result in PATH/quality.json.")
@click.option(
    "--tasks",
    metavar="NAME,...",
    help=f"Run these lm-eval tasks instead of texts ({install_extra('eval')}).",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Documents per task [default: all].",
)
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Folder with more task definitions (YAML). They may run Python code.",
)
@shared_options.raw
@shared_options.window
@shared_options.batch
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    metavar="N",
    help="Windows per text, from its beginning [default: all].",
)
@shared_options.device
@shared_options.gpu_cache
@shared_options.ram_cache
@shared_options.io
@shared_options.check
@shared_options.kernels
@shared_options.kv_bits
@output_options(interrupted="nothing was saved; the next run begins from the first text")
def command(
    path: Path,
    texts: tuple[Path, ...],
    against: Path | None,
    adapters: tuple[str, ...],
    save: bool,
    tasks: str | None,
    limit: int | None,
    task_folder: Path | None,
    raw: bool,
    window: int,
    batch: int,
    max_windows: int | None,
    output: Output,
    **options: Any,
) -> None:
    """Measure the perplexity of the model PATH.

    PATH is a converted folder, or an ordinary checkpoint, which runs in its stored dtype. Each text
    is tokenized and cut into windows that do not overlap. A window begins with BOS; all its other
    tokens are scored. Perplexity is exp of the mean negative log-likelihood per token. Results with
    different --window are not comparable.

    With --against, the command also reports the original's perplexity and the ratio, the mean KL
    divergence from the original (nats per token), the share of tokens with the same top choice, and
    the share of tokens for which a router chooses the same experts. Errors are standard errors over
    windows. Checkpoints are computed in float32. If PATH was converted with --adapter, give the
    same --adapter: it is merged into ORIGINAL.

    With --tasks, it runs lm-eval tasks instead. Documents go through the tokenizer's chat
    template if it has one, unless --raw is given. Results with and without a template are not
    comparable.
    """
    _check_options(
        texts=texts,
        against=against,
        adapters=adapters,
        save=save,
        tasks=tasks,
        limit=limit,
        task_folder=task_folder,
        raw=raw,
    )
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks:
        require_extra("lm_eval", "eval", "--tasks")
    import transformers

    import loader
    from formats.labels import to_label
    from formats.unconverted import is_converted
    from loader.evaluation.perplexity import measure_windows, named_windows, read_text
    from loader.hf.loading.plain_checkpoint import check_runnable, load_checkpoint, vocabulary_size
    from loader.hf.loading.tokenizer import check_tokens
    from loader.hf.modules.expert_layers import experts_modules

    transformers.utils.logging.disable_progress_bar()
    check_runnable(path)
    versions: dict[str, str] = {}
    if options["kv_bits"] == 8:
        if not is_converted(path):
            raise click.UsageError(f"--kv-bits 8: {path} is not a converted folder")
        versions["kv_bits"] = "8"

    def load(folder: Path) -> Any:
        with output.busy(f"loading {folder}"):
            if not is_converted(folder):
                return load_checkpoint(folder)
            model: Any = loader.from_pretrained(folder, **options)
        experts: Any = next(iter(experts_modules(model).values()))
        versions["kernels"] = experts.backend_name
        return model

    progress = output.progress("windows")

    if tasks:
        from loader.evaluation.lm_eval_tasks import check_tasks, run_tasks
        from loader.serving.prompts.chat_template import check_template, has_template, template_of

        check_tasks(names, task_folder)
        tokenizer = loader.load_tokenizer(path, check=options["check"])
        chat = has_template(tokenizer) and not raw
        if chat:
            check_template(template_of(tokenizer), "")
            output.note(
                "documents go through the tokenizer's chat template; --raw leaves them as they are"
            )
        model = load(path)
        with output.muted("lm_eval"), output.busy(f"running {', '.join(names)} by lm-eval"):
            results = run_tasks(
                model, tokenizer, names, batch=batch, chat=chat, limit=limit, folder=task_folder
            )
        lines = [
            (task, name, f"{value:.4f}")
            for task, metrics in results.items()
            for name, value in metrics.items()
        ]
        output.result(
            {"path": str(path), "chat_template": chat, "tasks": results},
            table([("task", "metric", "value"), *lines], left=2),
        )
        return
    named = [(to_label(text.name), read_text(text)) for text in texts]
    if against:
        from converter.cli.steps.against_original import compare_with_original
        from formats.files.overlap import refuse_inputs
        from formats.files.partial_file import partial_path
        from formats.quality import QUALITY_NAME, read_quality, save_evaluation

        if save and not is_converted(path):
            raise click.UsageError(f"--save: {path} is not a converted folder")
        if save:
            quality = path / QUALITY_NAME
            refuse_inputs([quality, partial_path(quality)], [*texts, against / QUALITY_NAME])
            # A damaged quality.json or a wrong option must fail before the long work.
            read_quality(path)
            check_out_file(quality)
        if is_converted(path):
            _check_loading(path, options)
        evaluation = compare_with_original(
            path, against, adapters, named, load, window=window, batch=batch,
            max_windows=max_windows, versions=versions, check=options["check"], output=output,
            progress=progress,
        )  # fmt: skip
        if save:
            save_evaluation(path, evaluation)
            output.note(f"saved in {path / 'quality.json'}")
        output.result(
            {"path": str(path), **msgspec.to_builtins(evaluation)}, evaluation_table(evaluation)
        )
        return
    tokenizer = loader.load_tokenizer(path, check=options["check"])
    windows = [
        (name, named_windows(tokenizer, name, text, window, max_windows)) for name, text in named
    ]
    for name, ids in windows:
        check_tokens(ids, tokenizer, vocabulary_size(path) or sys.maxsize, name)
    report = measure_windows(load(path), windows, batch=batch, progress=progress)
    rows: list[tuple[str, ...]] = [("text", "tokens", "perplexity")]
    rows += [
        (t.name, str(t.tokens), f"{t.perplexity:.3f}") for t in (*report.texts, report.overall)
    ]
    output.result({"path": str(path), **report.as_dict()}, table(rows))


def _check_loading(path: Path, options: dict[str, Any]) -> None:
    """Raise now what loading the converted model would raise after the original was computed."""
    from formats.artifact import Artifact
    from formats.sizes import parse_size
    from loader.arithmetic.backend import choose_backend
    from loader.cuda.device_choice import choose_devices
    from loader.decode.kv_bits_check import check_8bit_cache

    artifact = Artifact.open(path)
    devices = choose_devices(options["device"], artifact.packings)
    if options["kv_bits"] == 8:
        check_8bit_cache(artifact.architecture, artifact.config, devices)
    choose_backend(options["kernels"])
    for name in ("ram_cache", "gpu_cache"):
        if options[name] != "auto":
            parse_size(options[name], name)


def _check_options(
    *,
    texts: Any,
    against: Any,
    adapters: Any,
    save: bool,
    tasks: Any,
    limit: Any,
    task_folder: Any,
    raw: bool,
) -> None:
    if bool(texts) == bool(tasks):
        raise click.UsageError("give either --text or --tasks")
    if against and tasks:
        raise click.UsageError("--against compares on texts: give --text instead of --tasks")
    if save and not against:
        raise click.UsageError("--save needs --against")
    if adapters and not against:
        raise click.UsageError("--adapter needs --against: it is merged into that checkpoint")
    if tasks and not any(name.strip() for name in tasks.split(",")):
        raise click.UsageError("--tasks names no task")
    if (limit or task_folder or raw) and not tasks:
        raise click.UsageError("--limit, --task-folder and --raw need --tasks")


def evaluation_table(evaluation: Evaluation) -> str:
    """Return a comparison as text: a row per text, then the router agreement of each layer."""

    def error(value: float | None) -> str:
        return "-" if value is None else f"{value:.5f}"

    rows: list[tuple[str, ...]] = [
        (
            "text",
            "tokens",
            "perplexity",
            "original",
            "ratio",
            "±",
            "KL",
            "±",
            "same first",
            "same experts",
        )
    ]
    for c in (*evaluation.texts, evaluation.overall):
        rows.append(
            (
                c.name,
                str(c.tokens),
                f"{c.perplexity:.3f}",
                f"{c.original_perplexity:.3f}",
                f"{c.ratio:.4f}",
                error(c.ratio_error),
                f"{c.kl:.5f}",
                error(c.kl_error),
                f"{c.agreement:.3f}",
                f"{sum(c.routers) / len(c.routers):.3f}",
            )
        )
    by_layer = " ".join(f"{share:.3f}" for share in evaluation.overall.routers)
    return f"{table(rows)}\n\nsame experts by layer: {by_layer}"
