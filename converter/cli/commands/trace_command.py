"""`moe-convert trace`: records which experts a text or prompts use, for `replay` and `plan`."""

from pathlib import Path
from typing import Any

import click

from converter import __version__
from converter.cli.options import shared_options
from converter.cli.options.early_checks import check_out_file
from converter.cli.options.plot_option import check_plot, with_plot_option
from converter.cli.show.console import Output, output_options
from converter.cli.show.trace_plot import plot_trace
from formats.sizes import format_size


@click.command(
    "trace",
    epilog="""\b
Examples:
  moe-convert trace mixtral-2bit --text a.txt --text b.txt -o trace.zst
  moe-convert trace mixtral-2bit --prompts questions.txt -o trace.zst
  moe-convert trace mixtral-2bit --text a.txt -o trace.zst --plot experts.svg
  moe-convert replay trace.zst""",
)
@click.argument("path", type=click.Path(path_type=Path))
@shared_options.texts
@click.option(
    "--prompts",
    type=shared_options.FILE,
    multiple=True,
    metavar="FILE",
    help="A UTF-8 file with one prompt per line, instead of --text. Repeat the option for more.",
)
@shared_options.raw
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Trace file to write.",
)
@with_plot_option("how often each layer uses each expert")
@shared_options.window
@shared_options.batch
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Tokens per text, rounded down to whole windows but at least one window [default: all].",
)
@shared_options.max_new_tokens(64)
@shared_options.ram_cache
@shared_options.check
@shared_options.kernels
@output_options(interrupted="no trace was written; the next run begins from the first text")
def command(
    path: Path,
    texts: tuple[Path, ...],
    prompts: tuple[Path, ...],
    raw: bool,
    out: Path,
    plot: Path | None,
    window: int,
    batch: int,
    max_tokens: int | None,
    max_new_tokens: int,
    ram_cache: str,
    check: str,
    kernels: str,
    output: Output,
) -> None:
    """Record the routing of the model PATH, a converted folder or an ordinary checkpoint.

    For each token and layer the trace holds the chosen experts with their weights, and the
    prefetcher's predictions for the next layer. A --text runs in windows that do not overlap, as in
    eval; its tokens count as decoded, in reading order. Each of --prompts is answered with greedy
    decoding; with a chat template, the prompt is the user's message. docs/traces.md describes the
    file. It holds no text.
    """
    if bool(texts) == bool(prompts):
        raise click.UsageError("give either --text or --prompts")
    if raw and not prompts:
        raise click.UsageError("--raw needs --prompts")
    import transformers

    import loader
    from formats.files.overlap import refuse_inputs
    from formats.files.partial_file import partial_path
    from formats.unconverted import is_converted
    from loader.hf.loading.plain_checkpoint import load_checkpoint
    from loader.traces.record_trace import (
        TracedModel,
        read_prompts,
        text_windows,
        trace_inputs,
        trace_windows,
    )
    from loader.traces.trace import is_trace, write_trace

    of_model = (file for file in path.rglob("*") if not is_trace(file))
    refuse_inputs([out, partial_path(out)], [*texts, *prompts, *of_model])
    check_plot(plot, [out, partial_path(out), *texts, *prompts])
    transformers.utils.logging.disable_progress_bar()
    check_out_file(out)
    described = TracedModel.of_folder(path)
    tokenizer = loader.load_tokenizer(path, check=check)
    if texts:
        windows = text_windows(tokenizer, described, texts, window, max_tokens)
    else:
        inputs = read_prompts(tokenizer, described, prompts, raw=raw)
    with output.busy(f"loading {path}"):
        model: Any = (
            loader.from_pretrained(path, ram_cache=ram_cache, check=check, kernels=kernels)
            if is_converted(path)
            else load_checkpoint(path)
        )
    producer = f"moe-convert {__version__}"
    progress = output.progress("windows" if texts else "prompts")

    if texts:
        trace = trace_windows(
            model, described, producer, texts, windows, batch=batch, progress=progress
        )
    else:
        trace = trace_inputs(
            model,
            tokenizer,
            described,
            producer,
            prompts,
            inputs,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    write_trace(out, trace)
    if plot:
        plot_trace(trace, plot)
    size = out.stat().st_size
    result = {
        "out": str(out),
        "bytes": size,
        "tokens": trace.header.tokens,
        "prompt_tokens": sum(s.prompt_tokens for s in trace.header.sequences),
        "sequences": len(trace.header.sequences),
    }
    output.result(
        result,
        f"{trace.header.tokens} tokens in {len(trace.header.sequences)} sequences: {out},"
        f" {format_size(size)}",
    )
