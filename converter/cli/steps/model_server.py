"""Loads a model and serves it over HTTP, for `serve` and `chat --web`."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.show.console import Output
from converter.cli.steps.model_loading import LoadedModel, load_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from loader.serving.engine import Engine, Limits


@dataclass(frozen=True)
class ModelServerOptions:
    """Address and limits of a server. max_context: tokens, None is the default of `serve`."""

    host: str
    port: int
    max_context: int | None = None
    max_queue: int = 16
    prefix_bytes: int = 1 << 30


@dataclass(frozen=True)
class ModelServer:
    """A loaded model with its engine, and a socket that listens but is not served yet."""

    loaded: LoadedModel
    engine: "Engine"
    limits: "Limits"
    listening: socket.socket
    url: str


def open_server(
    path: Path,
    tokenizer: Any,
    server: ModelServerOptions,
    options: dict[str, Any],
    output: Output,
) -> ModelServer:
    """Load the model in `path` and start its engine.

    tokenizer: the result of `early_tokenizer`. options: those of `with_model_options`.
    """
    from loader.repository import small_files
    from loader.serving.context import ContextSize
    from loader.serving.engine import Engine, Limits
    from loader.serving.http.server import bound_socket, url_of

    size = ContextSize(small_files(path, options["revision"], options["token"]), options["kv_bits"])
    limits = Limits(size.chosen(server.max_context), server.max_queue, server.prefix_bytes)
    # A port that is taken must fail before the weights are read.
    listening = bound_socket(server.host, server.port)
    reserve_bytes = server.prefix_bytes + limits.max_context * size.position_bytes
    loaded = load_model(path, options, output, tokenizer, reserve_bytes=reserve_bytes)
    engine = Engine(loaded.model, loaded.tokenizer, limits)
    return ModelServer(loaded, engine, limits, listening, url_of(listening))


def run_server(
    app: "FastAPI",
    engine: "Engine | None",
    listening: socket.socket,
    output: Output,
    on_signal: Callable[[], None] = lambda: None,
) -> None:
    """Serve `app` until a signal. Arguments as in `loader.serving.http.server.Server`."""
    from loader.serving.http.server import Server

    is_over = Server(app, engine, on_signal).serve_on(listening)
    output.note("the server has stopped")
    if not is_over:
        # The model's forward pass hangs, and the interpreter would wait for its threads.
        output.note("a generation did not stop in time and was abandoned")
        os._exit(0)
