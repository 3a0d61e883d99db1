"""`moe-convert chat`: a conversation with a converted model, or with a server's model."""

import sys
from pathlib import Path
from typing import Any

import click

from converter.cli.chat.message_input import PipedLines, TypedLines, history_path
from converter.cli.options import shared_options
from converter.cli.options.api_key import read_api_key, with_api_key
from converter.cli.options.early_checks import given_options, require_extra
from converter.cli.options.model_options import with_model_options
from converter.cli.options.sampling_options import NAMES, settings_of, with_sampling_options
from converter.cli.show.console import Output, output_options
from converter.cli.steps.model_loading import LoadedModel, early_tokenizer, load_model

_WITH_URL = {"url", "model", "api_key", "api_key_file", "system", "max_new_tokens", *NAMES}
_WITH_URL |= {"web", "port", "quiet", "verbose"}
_PAGE_PORT = 7860


@click.command(
    "chat",
    epilog="""\b
Examples:
  moe-convert chat mixtral-2bit
  moe-convert chat mixtral-2bit --system "Be brief." --temperature 0.7
  moe-convert chat owner/mixtral-2bit --lazy
  moe-convert chat base-model-2bit --template chatml.jinja
  moe-convert chat mixtral-2bit < questions.txt > answers.txt
  moe-convert chat --url http://127.0.0.1:8000
  moe-convert chat mixtral-2bit --web""",
)
@click.argument("path", metavar="[PATH_OR_REPO]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--url",
    metavar="URL",
    help="Chat with a running server with OpenAI's API, such as `moe-convert serve`, instead of"
    " loading a model. Sampling options that are not given are the server's.",
)
@click.option(
    "--model", metavar="NAME", help="With --url: model of the server [default: the only one]."
)
@with_api_key("With --url: the server's key.")
@click.option(
    "--web",
    is_flag=True,
    help="Chat on a web page of this machine instead of in the terminal. Other machines cannot open"
    " it. Needs the extra `web`.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help=f"With --web: port of the page; 0 is any free port [default: {_PAGE_PORT}].",
)
@click.option("--system", default="", metavar="TEXT", help="System message [default: none].")
@shared_options.template
@shared_options.max_new_tokens(1024)
@shared_options.max_context(16, "the model's maximum; with --web at most 8192")
@with_sampling_options
@with_model_options
@output_options(interrupted="the chat had not started; run the same command again", has_json=False)
def command(
    path: Path | None,
    url: str | None,
    model: str | None,
    api_key: str | None,
    api_key_file: Path | None,
    web: bool,
    port: int | None,
    system: str,
    template: Path | None,
    max_new_tokens: int,
    max_context: int | None,
    output: Output,
    **options: Any,
) -> None:
    """Chat with the converted model PATH_OR_REPO, or with a server's model.

    PATH_OR_REPO is a folder, or owner/name of a repository on the Hub. The tokenizer's chat
    template turns the conversation into a prompt; a model without a template continues your text.
    The KV cache is kept between turns. The sampling options default to the model's
    generation_config.json.

    In the chat, /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. With --web, open
    the printed address in a browser; Ctrl-C ends the page.
    """
    settings = settings_of(max_new_tokens, options)
    if (path is None) == (url is None):
        raise click.UsageError("give PATH_OR_REPO or --url URL, one of them")
    if web:
        require_extra("gradio", "web", "--web")
        port = _PAGE_PORT if port is None else port
    elif port is not None:
        raise click.UsageError("--port needs --web")
    if url is None:
        assert path is not None
        if model is not None:
            raise click.UsageError("--model needs --url: PATH_OR_REPO names the model")
        _chat_here(path, port, settings, system, template, max_context, output, options)
    else:
        for name in given_options():
            if name not in _WITH_URL:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} has no effect with --url: the server decides it"
                )
        key = read_api_key(api_key, api_key_file)
        # Without the option, the server's limit holds.
        limit = max_new_tokens if "max_new_tokens" in given_options() else None
        _chat_there(url, key, model, port, settings, limit, system, output)


def _chat_here(
    path: Path,
    port: int | None,
    settings: Any,
    system: str,
    template: Path | None,
    max_context: int | None,
    output: Output,
    options: dict[str, Any],
) -> None:
    """Load the model and chat. port: port of the page; None is a chat in the terminal."""
    tokenizer = early_tokenizer(path, options["check"])

    from loader.evaluation.perplexity import read_text
    from loader.serving.prompts.chat_template import PlainText, check_template, template_of
    from loader.serving.session import Session

    template_text = read_text(template) if template else None
    if tokenizer:
        # A template that rejects the system message must fail before the weights are read.
        check_template(template_of(tokenizer, template_text), system)
    if port is not None:
        from converter.cli.chat.web_chat import chat_with_model

        chat_with_model(
            path, tokenizer, port, settings, system, template_text, max_context, output, options
        )
        return
    loaded = load_model(path, options, output, tokenizer)
    model, tokenizer = loaded.model, loaded.tokenizer
    used = template_of(tokenizer, template_text)
    settings = settings.filled_from(model.generation_config)
    session = Session(model, tokenizer, used, settings, system=system, context_tokens=max_context)
    notes = []
    if isinstance(used, PlainText):
        notes = [
            "The tokenizer has no chat template: the model continues the text."
            " --template FILE gives one."
        ]
    _run(session, str(path), loaded, notes, output)
    loaded.experts.report()


def _chat_there(
    url: str,
    key: str | None,
    model: str | None,
    port: int | None,
    settings: Any,
    max_new_tokens: int | None,
    system: str,
    output: Output,
) -> None:
    """Chat with a server. port: port of the page; None is a chat in the terminal."""
    from converter.cli.chat.remote_chat import RemoteChat

    remote = RemoteChat.connect(url, key, model)
    if port is not None:
        from converter.cli.chat.web_chat import chat_with_server

        chat_with_server(remote, port, settings, max_new_tokens, system, output)
        return
    session = remote.session(settings, max_new_tokens, system)
    _run(session, f"{remote.model} on {remote.server.url}", None, [], output)


def _run(
    session: Any, name: str, loaded: LoadedModel | None, notes: list[str], output: Output
) -> None:
    """Read messages until the user leaves. notes: lines to print first."""
    from converter.cli.chat.chat_loop import ChatLoop
    from converter.cli.chat.slash_commands import HELP, ChatCommands

    lines = TypedLines(history_path(), list(HELP)) if sys.stdin.isatty() else PipedLines()
    if lines.is_terminal:
        context = session.context_tokens
        size = f"{context} tokens of context. " if context else ""
        output.note(f"{name}: {size}/help lists commands, Ctrl-D leaves.")
    for note in notes:
        output.note(note)
    output.interrupted = "the conversation was not saved; /save keeps one"
    commands = ChatCommands(session, loaded.model if loaded else None, name)
    try:
        ChatLoop(session, lines, commands, output).run()
    finally:
        if isinstance(lines, TypedLines):
            lines.save()
