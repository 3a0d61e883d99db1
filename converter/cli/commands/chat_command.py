"""`moe-convert chat`: a conversation with a converted model."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.chat.message_input import PipedLines, TypedLines, history_path
from converter.cli.options.model_options import (
    ExpertsThere,
    early_tokenizer,
    load_model,
    with_model_options,
)
from converter.cli.options.sampling_options import settings_of, with_sampling_options
from converter.cli.show.console import Output, output_options


@click.command(
    "chat",
    epilog="""\b
Examples:
  moe-convert chat mixtral-2bit
  moe-convert chat mixtral-2bit --system "Answer in one sentence." --temperature 0.7
  moe-convert chat owner/mixtral-2bit --lazy
  moe-convert chat base-model-2bit --template chatml.jinja
  moe-convert chat mixtral-2bit < questions.txt > answers.txt""",
)
@click.argument("path", metavar="PATH_OR_REPO", type=click.Path(path_type=Path))
@click.option("--system", default="", metavar="TEXT", help="The system message.")
@click.option(
    "--template", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A chat template (Jinja), instead of the tokenizer's.",
)  # fmt: skip
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Of an answer.",
)
@click.option(
    "--max-context", type=click.IntRange(min=16),
    help="Tokens of the whole conversation [default: as many as the model was made for].",
)  # fmt: skip
@with_sampling_options
@with_model_options
@output_options(interrupted="the chat had not begun; run the same command again", has_json=False)
def command(
    path: Path,
    system: str,
    template: Path | None,
    max_new_tokens: int,
    max_context: int | None,
    output: Output,
    **options: Any,
) -> None:
    """Talk with the converted model in PATH_OR_REPO, a folder or owner/name of a repository on the
    Hub.

    The tokenizer's chat template makes prompts of the conversation; the KV cache is kept between
    turns. Sampling is the model's own (generation_config.json) unless an option is given. A model
    without a template continues what you write.

    \b
    /help lists the commands in the chat. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    settings = settings_of(max_new_tokens, options)
    tokenizer = early_tokenizer(path, options["check"])

    import loader
    from converter.cli.chat.chat_loop import ChatLoop
    from converter.cli.chat.slash_commands import HELP, ChatCommands
    from loader.evaluation.perplexity import read_text
    from loader.serving.prompts.chat_template import PlainText, check_template, template_of
    from loader.serving.session import Session

    template_text = read_text(template) if template else None
    if tokenizer:
        # What the template refuses shows before the weights are read.
        check_template(template_of(tokenizer, template_text), system)
    there = ExpertsThere(output)
    model: Any = load_model(path, options, there)
    tokenizer = tokenizer or loader.load_tokenizer(model.name_or_path, check=options["check"])
    used = template_of(tokenizer, template_text)
    settings = settings.filled_from(model.generation_config)
    session = Session(model, tokenizer, used, settings, system=system, context_tokens=max_context)
    lines = TypedLines(history_path(), list(HELP)) if sys.stdin.isatty() else PipedLines()
    if lines.is_terminal:
        output.note(
            f"{path}: {session.context_tokens} tokens of context. /help lists commands, Ctrl-D leaves."
        )
    if isinstance(used, PlainText):
        output.note(
            "The tokenizer has no chat template: the model continues the text. --template FILE gives one."
        )
    output.interrupted = "the conversation was not saved; /save keeps one"
    try:
        ChatLoop(session, lines, ChatCommands(session, model, str(path)), output).run()
    finally:
        if isinstance(lines, TypedLines):
            lines.save()
    there.say()
