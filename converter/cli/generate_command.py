"""`moe-convert generate`: text from a converted model, as it comes."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from converter.cli import shared_options
from converter.cli.generation_stats import Clock, stats_table, with_shares
from converter.cli.output import Output, gigabytes, output_options
from converter.cli.terminal import printable
from formats.errors import MoeConvertError


@click.command(
    "generate",
    epilog="""\b
Examples:
  moe-convert generate mixtral-2bit --prompt "Once upon a time" --max-new-tokens 64
  moe-convert generate mixtral-2bit --prompt - --ram-cache 6GiB --stats < question.txt
  moe-convert generate mixtral-2bit --prompt "Hello" --temperature 0.8 --seed 1
  moe-convert generate mixtral-2bit --prompt "Hello" --device cuda --gpu-cache 8GiB --ram-cache 16GiB
  moe-convert generate owner/mixtral-2bit --lazy --prompt "Hello"   (experts come when they are needed)""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to go on from; - reads it from stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample at this temperature; 0 or none is greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample among the tokens with this total probability."
)
@click.option("--seed", type=int, help="Seed of the sampling.")
@shared_options.device
@shared_options.gpu_cache
@shared_options.ram_cache
@shared_options.io
@click.option(
    "--policy", type=click.Choice(["lrfu", "lru", "lfu"]), default="lrfu", show_default=True,
    help="Which expert leaves a full layer.",
)  # fmt: skip
@click.option(
    "--prefetch", type=click.Choice(["auto", "0", "1", "2"]), default="auto", show_default=True,
    help="Experts of the next layer to guess and read ahead; auto: as many as a token uses.",
)  # fmt: skip
@click.option("--no-prefetch", is_flag=True, help="The same as --prefetch 0.")
@click.option(
    "--cpu-share", type=click.Choice(["off", "auto"]), default="off", show_default=True,
    help="With a GPU: auto computes missed experts on the CPU where that is sooner done than copying them.",
)  # fmt: skip
@shared_options.check
@click.option(
    "--trace", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Divide --ram-cache among the layers as this routing trace would have read least, instead of evenly.",
)  # fmt: skip
@shared_options.kernels
@click.option("--lazy", is_flag=True, help="Of a Hub repository: begin before all experts are there.")
@shared_options.revision
@shared_options.token
@click.option("--stats", is_flag=True, help="Show cache hits, guesses, bytes read, waits and speed on stderr.")
@output_options(interrupted="nothing was generated yet; run the same command again")
def command(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    ram_cache: str,
    io: str,
    prefetch: str,
    no_prefetch: bool,
    trace: Path | None,
    kernels: str,
    stats: bool,
    output: Output,
    **options: Any,
) -> None:
    """Generate text with the converted model in PATH, a folder or owner/name of a repository on the Hub.

    Greedy, unless --temperature or --top-p is given. The text streams to stdout.
    """
    import torch
    import transformers

    import loader
    from formats.unconverted import check_converted

    transformers.utils.logging.disable_progress_bar()
    there = _There(output)
    text = _prompt(prompt)
    # Before the weights, where no branch can move meanwhile.
    if path.is_dir():
        check_converted(path)
    tokenizer = loader.load_tokenizer(path, check=options["check"]) if path.is_dir() else None
    inputs = _tokens(tokenizer, text, path) if tokenizer else None
    if trace:
        options["slots"] = _slots(trace, path, ram_cache, io, options["policy"])
    options["prefetch"] = 0 if no_prefetch else int(prefetch) if prefetch.isdigit() else prefetch
    model = loader.from_pretrained(path, ram_cache=ram_cache, io=io, kernels=kernels, progress=there, **options)
    # What was loaded, wherever that is: a branch may have moved meanwhile.
    tokenizer = tokenizer or loader.load_tokenizer(model.name_or_path, check=options["check"])
    inputs = inputs or _tokens(tokenizer, text, Path(model.name_or_path))
    if seed is not None:
        torch.manual_seed(seed)
    clock = Clock(None if output.as_json else _streamer(tokenizer), model, live=stats and not output.quiet)
    with torch.inference_mode(), _stopped(clock, output):
        ids = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            streamer=clock,
            # One prompt has no padding; without an id transformers warns at every call.
            pad_token_id=_pad_token(model, tokenizer),
            **_sampling(temperature, top_p),
        )
    prompt_tokens = inputs["input_ids"].shape[1]
    new_ids = ids[0, prompt_tokens:]
    times = clock.times(len(new_ids))
    result = {
        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new_ids),
        **times,
        "cache": with_shares(model.moe_stats().as_dict(), times["seconds"]),
        **there.facts(),
    }
    if output.as_json:
        output.result(result, "")
    if stats:
        click.echo(stats_table(result), err=True)
    there.say()


def _prompt(prompt: str) -> str:
    """The text of --prompt; MoeConvertError if it is not UTF-8."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        # Bytes that are not UTF-8 come from the command line, and in some locales from stdin, as lone surrogates.
        text.encode()
    except UnicodeError:
        where = "the prompt on stdin" if prompt == "-" else "--prompt"
        raise MoeConvertError(f"{where} is not UTF-8", "give the prompt in UTF-8") from None
    return text


def _tokens(tokenizer: Any, text: str, path: Path) -> Any:
    """The tokenizer's tensors of `text`; MoeConvertError if there is none, or one that the model lacks."""
    from loader.checkpoint import vocabulary_size
    from loader.tokenizer import check_tokens

    inputs = tokenizer(text, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise MoeConvertError("the prompt is empty and the tokenizer adds no BOS token", "give a prompt")
    check_tokens(inputs["input_ids"], tokenizer, vocabulary_size(path) or sys.maxsize, "the prompt")
    return inputs


def _streamer(tokenizer: Any) -> Any:
    """Writes the new text to stdout as it comes."""
    import transformers

    class Streamer(transformers.TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # What a token spells is a stranger's file's.
            super().on_finalized_text(printable(text), stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextlib.contextmanager
def _stopped(clock: Clock, output: Output) -> Iterator[None]:
    """Ends the streamed text at an interrupt, and says how much of it there is."""
    try:
        yield
    except KeyboardInterrupt:
        clock.end()
        output.interrupted = f"stopped after {clock.tokens} new tokens; a generation does not resume"
        if clock.tokens and not output.as_json:
            output.interrupted += ": to go on, give the prompt and the text above as --prompt"
        raise


def _slots(trace: Path, path: Path, ram_cache: str, io: str, policy: str) -> list[int]:
    """Slots of each layer that would have read least for `trace`."""
    from formats.artifact import Artifact
    from loader.budget import ram_budget
    from loader.policy import POLICIES
    from loader.slot_shares import slots_from_trace
    from loader.trace import read_trace

    if not path.is_dir():
        raise click.UsageError(f"--trace: only for a folder, and {path} is none")
    artifact = Artifact.open(path)
    return slots_from_trace(read_trace(trace), artifact, ram_budget(ram_cache, artifact), POLICIES[policy], io=io)


class _There:
    """How much of a lazily loaded model is there: a bar until it is loaded, then a line at the end."""

    def __init__(self, output: Output) -> None:
        self._output, self._bar = output, output.progress()
        self._experts: tuple[int, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "experts":
            # Over the text that is being written a bar would only disturb.
            self._experts = done, total
        else:
            self._bar(stage, done, total)

    def facts(self) -> dict[str, int]:
        return dict(zip(("experts_there_bytes", "experts_bytes"), self._experts, strict=True)) if self._experts else {}

    def say(self) -> None:
        if self._experts:
            done, total = self._experts
            text = f"{gigabytes(done)} of {gigabytes(total)} of the experts are there ({100 * done // total} %)"
            self._output.note(text)


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Arguments of `generate`; greedy ones also switch off what generation_config.json may ask for."""
    if temperature == 0 or (temperature is None and top_p is None):
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}


def _pad_token(model: Any, tokenizer: Any) -> int | None:
    """The padding token, or what stands in for it where the model has none."""
    for found in (model.generation_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return None
