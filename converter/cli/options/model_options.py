"""The options of commands that load a model to write text with it, and the loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.cli.options import shared_options
from converter.cli.show.console import Output, gigabytes

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    shared_options.device,
    shared_options.gpu_cache,
    shared_options.ram_cache,
    shared_options.io,
    click.option(
        "--policy",
        type=click.Choice(["lrfu", "lru", "lfu"]),
        default="lrfu",
        show_default=True,
        help="Which expert leaves a full layer.",
    ),
    click.option(
        "--prefetch",
        type=click.Choice(["auto", "0", "1", "2"]),
        default="auto",
        show_default=True,
        help="Experts of the next layer to guess and read ahead; auto: as many as a token uses.",
    ),
    click.option("--no-prefetch", is_flag=True, help="The same as --prefetch 0."),
    click.option(
        "--cpu-share",
        type=click.Choice(["off", "auto"]),
        default="off",
        show_default=True,
        help="With a GPU: auto computes missed experts on the CPU where that is sooner done than copying them.",
    ),
    shared_options.check,
    click.option(
        "--trace",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Divide --ram-cache among the layers as this routing trace would have read least, instead of evenly.",
    ),
    shared_options.kernels,
    click.option(
        "--lazy", is_flag=True, help="Of a Hub repository: begin before all experts are there."
    ),
    shared_options.revision,
    shared_options.token,
)


def with_model_options(function: F) -> F:
    """Add the options of memory, reading and origin; the command passes them to `load_model` as a
    dict.
    """
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def early_tokenizer(path: Path, check: str) -> Any:
    """Return the tokenizer of a converted folder, before its weights are read; None of a
    repository, where a branch may move before the weights come.
    """
    import loader
    from formats.repair.unconverted import check_converted

    if not path.is_dir():
        return None
    check_converted(path)
    return loader.load_tokenizer(path, check=check)


def load_model(path: Path, options: dict[str, Any], progress: "ExpertsThere") -> Any:
    """Return the model in `path`, a folder or owner/name, loaded by the options of
    `with_model_options`.
    """
    import transformers

    import loader

    transformers.utils.logging.disable_progress_bar()
    arguments = dict(options)
    no_prefetch = arguments.pop("no_prefetch")
    trace = arguments.pop("trace")
    prefetch = arguments["prefetch"]
    arguments["prefetch"] = 0 if no_prefetch else int(prefetch) if prefetch.isdigit() else prefetch
    if trace:
        arguments["slots"] = _slots(trace, path, options)
    return loader.from_pretrained(path, progress=progress, **arguments)


def _slots(trace: Path, path: Path, options: dict[str, Any]) -> list[int]:
    """Return the slots of each layer that would have read least for `trace`."""
    from formats.artifact import Artifact
    from loader.experts.policy import POLICIES
    from loader.planning.budget import ram_budget
    from loader.traces.slot_shares import slots_from_trace
    from loader.traces.trace import read_trace

    if not path.is_dir():
        raise click.UsageError(f"--trace: only for a folder, and {path} is none")
    artifact = Artifact.open(path)
    budget = ram_budget(
        options["ram_cache"], artifact, reserve_bytes=options.get("reserve_bytes", 0)
    )
    return slots_from_trace(
        read_trace(trace), artifact, budget, POLICIES[options["policy"]], io=options["io"]
    )


class ExpertsThere:
    """How much of a lazily loaded model is there: a bar until it is loaded, then a line at the end."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar = output.progress()
        self._experts: tuple[int, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "experts":
            # Over the text that is being written a bar would only disturb.
            self._experts = done, total
        else:
            self._bar(stage, done, total)

    def facts(self) -> dict[str, int]:
        """Return both sizes in bytes, for JSON."""
        return (
            dict(zip(("experts_there_bytes", "experts_bytes"), self._experts, strict=True))
            if self._experts
            else {}
        )

    def say(self) -> None:
        """Print the line."""
        if self._experts:
            done, total = self._experts
            text = f"{gigabytes(done)} of {gigabytes(total)} of the experts are there ({100 * done // total} %)"
            self._output.note(text)
