"""The section of a model card on quality: what was measured, or how to measure it."""

from collections.abc import Iterator

from converter.publish.card_markdown import block, code
from converter.publish.card_usage import FOLDER, Usage
from formats.quality import Comparison, Evaluation, Quality


def quality_lines(quality: Quality | None, usage: Usage) -> Iterator[str]:
    """Yield what quality.json holds, with its meaning, or the command that measures it."""
    if quality and quality.evaluation:
        yield from _evaluation_lines(quality.evaluation)
    else:
        yield from _command_lines(usage)
    totals = quality.totals if quality else {}
    errors = [
        f"{totals[name]:.3f} ({name})" for name in ("experts", "attention") if totals.get(name)
    ]
    if errors:
        yield ""
        yield f"The weights have these relative errors: {', '.join(errors)}."
        yield "They are ‖quantized − original‖ / ‖original‖, and do not tell how good the text is."
        yield "`quality.json` has the error of each matrix."


def _evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    original = code(evaluation.original)
    yield f"Compared with the original {original} in windows of {evaluation.window} tokens:"
    yield ""
    yield "| text | tokens | perplexity | original's | ratio | KL | same top token |"
    yield "|---|---|---|---|---|---|---|"
    several = len(evaluation.texts) > 1
    rows = [*evaluation.texts, evaluation.overall] if several else evaluation.texts
    yield from map(_comparison_line, rows)
    yield ""
    yield "- *ratio*: perplexity divided by the original's. 1 means no loss."
    yield "- *KL*: mean KL divergence from the original, in nats per token. 0 means no loss."
    yield "- *same top token*: how often both models predict the same token."


def _command_lines(usage: Usage) -> Iterator[str]:
    yield "Nobody has compared this model's predictions with the original's yet."
    yield "To do it, you need the original's folder, here `original`, and a text of yours:"
    yield ""
    if usage.name == FOLDER:
        lines = ["moe-convert eval . --text my-text.txt --against original --save"]
    else:
        lines = [
            usage.command("download", " --local-dir converted"),
            "moe-convert eval converted --text my-text.txt --against original",
        ]
    yield from block("bash", *lines)


def _comparison_line(c: Comparison) -> str:
    cells = [
        code(c.name),
        f"{c.tokens:,}",
        f"{c.perplexity:.3f}",
        f"{c.original_perplexity:.3f}",
        f"{c.ratio:.4f}",
        f"{c.kl:.5f}",
        f"{c.agreement:.2%}",
    ]
    return f"| {' | '.join(cells)} |"
