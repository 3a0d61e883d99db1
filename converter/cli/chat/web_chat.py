"""Starts `moe-convert chat --web`: a page over a loaded model, or over a running server."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from converter.cli.chat.chat_server import ChatServer
from converter.cli.chat.remote_chat import RemoteChat
from converter.cli.chat.web_page import WebPage
from converter.cli.show.console import Output
from converter.cli.steps.model_server import ModelServerOptions, open_server, run_server
from loader.serving.answers.settings import GenerationSettings
from loader.serving.http.app import AppOptions, build_app
from loader.serving.http.server import bound_socket, url_of
from loader.serving.prompts.chat_template import (
    check_template,
    has_template,
    plain_template,
    template_of,
)

_HOST = "127.0.0.1"
NO_TEMPLATE = "The tokenizer has no chat template: the model continues the text."


def chat_with_model(
    path: Path,
    tokenizer: Any,
    port: int,
    settings: GenerationSettings,
    system: str,
    template: str | None,
    max_context: int | None,
    output: Output,
    options: dict[str, Any],
) -> None:
    """Load the model in `path` and serve it with a page until a signal.

    tokenizer: the result of `early_tokenizer`. template: text of a chat template, or None.
    """
    address = ModelServerOptions(_HOST, port, max_context)
    server = open_server(path, tokenizer, address, options, output)
    tokenizer = server.loaded.tokenizer
    notes = []
    if not (template or has_template(tokenizer)):
        template = plain_template(tokenizer)
        notes = [NO_TEMPLATE]
    # The tokenizer of a repository was not known before.
    check_template(template_of(tokenizer, template), system)
    name = path.resolve().name
    app = build_app(server.engine, tokenizer, AppOptions(name, template=template))
    settings = settings.filled_from(server.loaded.model.generation_config)
    if not settings.samples:
        # Without a temperature the server samples.
        settings = replace(settings, temperature=0)
    remote = RemoteChat(ChatServer(server.url), name, server.limits.max_context)
    page = WebPage(remote, settings, settings.max_new_tokens, system, notes)
    end_streams = page.mount(app)
    output.note(f"chat page: {server.url}   API: {server.url}/v1   Ctrl-C stops both")
    run_server(app, server.engine, server.listening, output, end_streams)
    server.loaded.experts.report()


def chat_with_server(
    remote: RemoteChat,
    port: int,
    settings: GenerationSettings,
    max_new_tokens: int | None,
    system: str,
    output: Output,
) -> None:
    """Serve a page for the server `remote` until a signal."""
    listening = bound_socket(_HOST, port)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    end_streams = WebPage(remote, settings, max_new_tokens, system).mount(app)
    output.note(f"chat page: {url_of(listening)}   model: {remote.model}   Ctrl-C stops the page")
    run_server(app, None, listening, output, end_streams)
