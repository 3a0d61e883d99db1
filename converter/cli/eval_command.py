"""`moe-convert eval`: perplexity of a converted folder or of an ordinary checkpoint, alone or against the original."""

from pathlib import Path
from typing import Any

import click

from converter.cli.output import Output, output_options, table


@click.command(
    "eval",
    epilog="""\b
Examples:
  moe-convert eval mixtral-2bit --text examples/text/english.txt
  moe-convert eval ./Mixtral-8x7B-v0.1 --text a.txt --text b.txt --window 512 --json
  moe-convert eval mixtral-2bit --text a.txt --max-windows 4      (a quick look)
  moe-convert eval mixtral-2bit --text a.txt --against ./Mixtral-8x7B-v0.1""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--text", "texts", type=click.Path(path_type=Path, exists=True, dir_okay=False), multiple=True, required=True,
    help="A UTF-8 text; give the option again for more.",
)  # fmt: skip
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="ORIGINAL",
    help="Compare with the model in this folder, which must fit in memory beside it: perplexity ratio, KL, agreement.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens a window, BOS included."
)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Windows at a time.")
@click.option("--max-windows", type=click.IntRange(min=1), help="Only the first windows of each text.")
@click.option("--ram-cache", default="auto", show_default=True, metavar="SIZE", help="Memory for experts, e.g. 6GiB.")
@click.option(
    "--io", type=click.Choice(["auto", "mmap", "pread"]), default="auto", show_default=True, help="How to read experts."
)
@click.option("--kernels", type=click.Choice(["auto", "native", "torch"]), default="auto", show_default=True)
@output_options
def command(
    path: Path,
    texts: tuple[Path, ...],
    against: Path | None,
    window: int,
    batch: int,
    max_windows: int | None,
    ram_cache: str,
    io: str,
    kernels: str,
    output: Output,
) -> None:
    """Measure the perplexity of the model in PATH: a converted folder, or an ordinary checkpoint in its stored dtype.

    Each text is tokenized whole and cut into windows that do not overlap; each begins with BOS and all its other tokens
    are scored; perplexity is exp of the mean negative log-likelihood a token. Compare numbers of one --window only.

    With --against, instead: the perplexity ratio, the mean KL divergence from the original's predictions (nats a
    token), how often both have the same first choice, and the share of the experts chosen alike, with standard errors
    over windows.
    """
    import transformers

    import loader
    from loader.checkpoint import is_converted, load_checkpoint
    from loader.perplexity import measure_perplexity, read_text

    transformers.utils.logging.disable_progress_bar()
    named = [(text.name, read_text(text)) for text in texts]

    def load(folder: Path) -> Any:
        if is_converted(folder):
            return loader.from_pretrained(folder, ram_cache=ram_cache, io=io, kernels=kernels)
        return load_checkpoint(folder)

    def note(name: str, done: int, total: int) -> None:
        if done == total:
            output.note(f"{name}: {total} windows")

    if against is not None:
        from loader.comparison import compare_models

        compared = compare_models(
            load(against), load(path), loader.load_tokenizer(path), named,
            window=window, max_windows=max_windows, progress=note,
        )  # fmt: skip
        result = {"path": str(path), "against": str(against), "window": window}
        output.result(result | {"texts": [c.as_dict() for c in compared]}, _compared(compared))
        return
    model = load(path)
    report = measure_perplexity(
        model,
        loader.load_tokenizer(path),
        named,
        window=window,
        batch=batch,
        max_windows=max_windows,
        progress=note,
    )
    rows: list[tuple[str, ...]] = [("text", "tokens", "perplexity")]
    rows += [(t.name, str(t.tokens), f"{t.perplexity:.3f}") for t in (*report.texts, report.overall)]
    output.result({"path": str(path), **report.as_dict()}, table(rows))


def _compared(compared: Any) -> str:
    rows: list[tuple[str, ...]] = [("text", "tokens", "ratio", "±", "KL", "±", "same first", "same experts")]
    for c in compared:
        routers = f"{sum(c.routers) / len(c.routers):.3f}" if c.routers else "-"
        rows.append(
            (
                c.name, str(c.tokens), f"{c.ratio:.4f}", f"{c.log_ratio_error:.4f}", f"{c.kl:.5f}", f"{c.kl_error:.5f}",
                f"{c.agreement:.3f}", routers,
            )
        )  # fmt: skip
    return table(rows)
