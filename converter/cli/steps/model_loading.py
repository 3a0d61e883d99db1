"""Loads a model and its tokenizer as the options of `with_model_options` say."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from converter.cli.show.console import Output
from formats.sizes import format_size


def early_tokenizer(path: Path, check: str) -> Any:
    """Return the tokenizer of a converted folder before its weights are read.

    Return None for a repository: its branch may move before the weights are downloaded.
    """
    import loader
    from formats.unconverted import check_converted

    if not path.is_dir():
        return None
    check_converted(path)
    return loader.load_tokenizer(path, check=check)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer. `experts`: how much of a lazily loaded model is on the disk."""

    model: Any
    tokenizer: Any
    experts: "ExpertsOnDisk"


def load_model(
    path: Path,
    options: dict[str, Any],
    output: Output,
    tokenizer: Any = None,
    *,
    reserve_bytes: int = 0,
) -> LoadedModel:
    """Load the model in `path`, a folder or owner/name on the Hub.

    tokenizer: what `early_tokenizer` returned. reserve_bytes: memory that the expert cache leaves
    free.
    """
    import transformers

    import loader

    transformers.utils.logging.disable_progress_bar()
    experts = ExpertsOnDisk(output)
    arguments = {**options, "reserve_bytes": reserve_bytes}
    no_prefetch = arguments.pop("no_prefetch")
    trace = arguments.pop("trace")
    prefetch = arguments["prefetch"]
    arguments["prefetch"] = 0 if no_prefetch else int(prefetch) if prefetch.isdigit() else prefetch
    if trace:
        arguments["slots"] = _slots(trace, path, options, reserve_bytes)
    # A repository's download draws bars of its own.
    with output.busy(f"loading {path}") if path.is_dir() else nullcontext():
        model: Any = loader.from_pretrained(path, progress=experts, **arguments)
    # From the folder that was loaded: the repository's branch may have moved since.
    tokenizer = tokenizer or loader.load_tokenizer(model.name_or_path, check=options["check"])
    return LoadedModel(model, tokenizer, experts)


def _slots(trace: Path, path: Path, options: dict[str, Any], reserve_bytes: int) -> list[int]:
    """Return the slots of each layer with which `trace` reads the fewest bytes."""
    from formats.artifact import Artifact
    from loader.budget.ram import ram_budget
    from loader.experts.policy import POLICIES
    from loader.traces.slot_shares import slots_from_trace
    from loader.traces.trace import read_trace

    if not path.is_dir():
        raise click.UsageError(f"--trace needs a converted folder, and {path} is not a folder")
    artifact = Artifact.open(path)
    budget = ram_budget(options["ram_cache"], artifact, reserve_bytes=reserve_bytes)
    return slots_from_trace(
        read_trace(trace), artifact, budget, POLICIES[options["policy"]], io=options["io"]
    )


class ExpertsOnDisk:
    """Progress of a lazily loaded model: a bar while it loads, one line at the end."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar = output.progress()
        self._experts: tuple[int, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "experts":
            # A bar would disturb the text that is printed meanwhile.
            self._experts = done, total
        else:
            self._bar(stage, done, total)

    def facts(self) -> dict[str, int]:
        """Return both sizes in bytes, for JSON; empty if the model is not lazy."""
        if self._experts is None:
            return {}
        done, total = self._experts
        return {"experts_there_bytes": done, "experts_bytes": total}

    def report(self) -> None:
        """Print how much of the experts is on the disk, if the model is lazy."""
        if self._experts is None:
            return
        done, total = self._experts
        percent = 100 * done // total
        self._output.note(
            f"{format_size(done)} of {format_size(total)} of the experts are there ({percent} %)"
        )
