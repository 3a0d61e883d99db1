"""`moe-convert chat`: a conversation with a converted model."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.chat.message_input import PipedLines, TypedLines, history_path
from converter.cli.options import shared_options
from converter.cli.options.model_options import with_model_options
from converter.cli.options.sampling_options import settings_of, with_sampling_options
from converter.cli.show.console import Output, output_options
from converter.cli.steps.model_loading import early_tokenizer, load_model


@click.command(
    "chat",
    epilog="""\b
Examples:
  moe-convert chat mixtral-2bit
  moe-convert chat mixtral-2bit --system "Be brief." --temperature 0.7
  moe-convert chat owner/mixtral-2bit --lazy
  moe-convert chat base-model-2bit --template chatml.jinja
  moe-convert chat mixtral-2bit < questions.txt > answers.txt""",
)
@click.argument("path", metavar="PATH_OR_REPO", type=click.Path(path_type=Path))
@click.option("--system", default="", metavar="TEXT", help="System message [default: none].")
@shared_options.template
@shared_options.max_new_tokens(1024)
@shared_options.max_context(16, "the model's maximum")
@with_sampling_options
@with_model_options
@output_options(interrupted="the chat had not started; run the same command again", has_json=False)
def command(
    path: Path,
    system: str,
    template: Path | None,
    max_new_tokens: int,
    max_context: int | None,
    output: Output,
    **options: Any,
) -> None:
    """Chat with the converted model PATH_OR_REPO.

    PATH_OR_REPO is a folder, or owner/name of a repository on the Hub. The tokenizer's chat
    template turns the conversation into a prompt; a model without a template continues your text.
    The KV cache is kept between turns. The sampling options default to the model's
    generation_config.json.

    In the chat, /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.
    """
    settings = settings_of(max_new_tokens, options)
    tokenizer = early_tokenizer(path, options["check"])

    from converter.cli.chat.chat_loop import ChatLoop
    from converter.cli.chat.slash_commands import HELP, ChatCommands
    from loader.evaluation.perplexity import read_text
    from loader.serving.prompts.chat_template import PlainText, check_template, template_of
    from loader.serving.session import Session

    template_text = read_text(template) if template else None
    if tokenizer:
        # A template that rejects the system message must fail before the weights are read.
        check_template(template_of(tokenizer, template_text), system)
    loaded = load_model(path, options, output, tokenizer)
    model, tokenizer = loaded.model, loaded.tokenizer
    used = template_of(tokenizer, template_text)
    settings = settings.filled_from(model.generation_config)
    session = Session(model, tokenizer, used, settings, system=system, context_tokens=max_context)
    lines = TypedLines(history_path(), list(HELP)) if sys.stdin.isatty() else PipedLines()
    if lines.is_terminal:
        output.note(
            f"{path}: {session.context_tokens} tokens of context."
            " /help lists commands, Ctrl-D leaves."
        )
    if isinstance(used, PlainText):
        output.note(
            "The tokenizer has no chat template: the model continues the text."
            " --template FILE gives one."
        )
    output.interrupted = "the conversation was not saved; /save keeps one"
    try:
        ChatLoop(session, lines, ChatCommands(session, model, str(path)), output).run()
    finally:
        if isinstance(lines, TypedLines):
            lines.save()
    loaded.experts.report()
