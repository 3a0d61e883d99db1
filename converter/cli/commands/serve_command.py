"""`moe-convert serve`: a converted model over HTTP, as OpenAI's interface describes it."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.options.model_options import (
    ExpertsThere,
    early_tokenizer,
    load_model,
    with_model_options,
)
from converter.cli.show.console import Output, gigabytes, output_options
from formats.errors import MoeConvertError

KEY_VARIABLE = "MOE_CONVERT_API_KEY"
_PACKAGES = ("fastapi", "uvicorn")


@click.command(
    "serve",
    epilog="""\b
Examples:
  moe-convert serve mixtral-2bit
  moe-convert serve mixtral-2bit --ram-cache 8GiB --max-context 4096 --prefix-cache 2GiB
  MOE_CONVERT_API_KEY=... moe-convert serve mixtral-2bit --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "mixtral-2bit", "prompt": "Once upon a time", "max_tokens": 32}'
A signal ends the server within 10 seconds; what runs may finish for 5 of them.""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; others need a key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0: any free one.",
)
@click.option(
    "--api-key", envvar=KEY_VARIABLE, metavar="KEY",
    help=f"Key that requests must bring; other users see it in the list of processes, so better in {KEY_VARIABLE}.",
)  # fmt: skip
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with the key.",
)
@click.option(
    "--model-name",
    metavar="NAME",
    help="What clients call the model [default: the last part of PATH].",
)
@click.option(
    "--max-context", type=click.IntRange(min=2), metavar="TOKENS",
    help="Tokens of a prompt with its answer [default: as many as the model was made for, at most 8192].",
)  # fmt: skip
@click.option(
    "--max-queue", type=click.IntRange(min=0), default=16, show_default=True,
    help="Requests that may wait beside the one that runs; more get status 429.",
)  # fmt: skip
@shared_options.prefix_cache(
    "1GiB",
    "Memory for KV caches of finished answers, which conversations that go on reuse; 0 keeps none.",
)
@click.option(
    "--template", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A chat template (Jinja) in place of the tokenizer's.",
)  # fmt: skip
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="A web page's origin that may ask; repeat it for more.",
)
@with_model_options
@output_options(interrupted="the model was not served yet; run the same command again")
def command(
    path: Path,
    host: str,
    port: int,
    api_key: str | None,
    api_key_file: Path | None,
    model_name: str | None,
    max_context: int | None,
    max_queue: int,
    prefix_cache: int,
    template: Path | None,
    cors: tuple[str, ...],
    output: Output,
    **options: Any,
) -> None:
    """Serve the converted model in PATH, a folder or owner/name of a repository on the Hub, over
    HTTP.

    Routes: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics (Prometheus). One
    answer is generated at a time, first come, first served. A parameter that is not supported is
    refused by its name. docs/clients.md says which clients were tried, and what they may ask for.
    """
    key = _key(api_key, api_key_file)
    _check_packages()
    if key is None and not _is_loopback(host):
        raise click.UsageError(
            f"--host {host} needs a key: set {KEY_VARIABLE}, or give --api-key-file FILE"
        )
    import loader
    from loader.evaluation.perplexity import read_text
    from loader.repository import small_files
    from loader.serving.context import ContextSize
    from loader.serving.engine import Engine, Limits
    from loader.serving.http.app import AppOptions, build_app
    from loader.serving.http.server import Server, bound_socket, url_of
    from loader.serving.prompts.chat_template import has_template

    text = read_text(template) if template else None
    tokenizer = early_tokenizer(path, options["check"])
    size = ContextSize(small_files(path, options["revision"], options["token"]))
    limits = Limits(size.chosen(max_context), max_queue, prefix_cache)
    # Before the weights: a port that is taken is said at once.
    listening = bound_socket(host, port)
    reserve_bytes = prefix_cache + limits.max_context * size.position_bytes
    there = ExpertsThere(output)
    model: Any = load_model(path, {**options, "reserve_bytes": reserve_bytes}, there)
    tokenizer = tokenizer or loader.load_tokenizer(model.name_or_path, check=options["check"])
    name = model_name or path.resolve().name
    engine = Engine(model, tokenizer, limits)
    server = Server(build_app(engine, tokenizer, AppOptions(name, key, cors, text)), engine)
    url = url_of(listening)
    if output.as_json:
        output.result({"url": url, "model": name, "max_context": limits.max_context}, "")
    output.note(
        f"serving {name!r} on {url}/v1: {limits.max_context} tokens of context, {gigabytes(prefix_cache)} of prefix"
        f" caches, {'with' if key else 'without'} a key; Ctrl-C ends it"
    )
    if not (text or has_template(tokenizer)):
        output.note(
            "The tokenizer has no chat template: only /v1/completions answers. --template FILE gives one."
        )
    _run(server, listening, output)
    there.say()


def _run(server: Any, listening: Any, output: Output) -> None:
    """Serves until a signal."""
    is_over = server.serve_on(listening)
    output.note("the server has ended")
    if not is_over:
        # A pass through the model does not come back: the interpreter would wait for its threads.
        output.note("a generation did not end in time and is given up")
        os._exit(0)


def _key(given: str | None, file: Path | None) -> str | None:
    """The key of --api-key, its variable or --api-key-file."""
    if file is None:
        key = given
    else:
        if (
            given is not None
            and click.get_current_context().get_parameter_source("api_key") is not _ENVIRONMENT
        ):
            raise click.UsageError("give --api-key or --api-key-file, not both")
        try:
            key = file.read_text(encoding="utf-8").strip()
        except UnicodeError as e:
            raise MoeConvertError(f"{file}: a key in UTF-8 was expected: {e}") from None
    if key is None:
        return None
    if not key.strip() or not key.isascii() or any(c.isspace() for c in key):
        raise click.UsageError("the API key must be ASCII without spaces, and not empty")
    return key


_ENVIRONMENT = click.core.ParameterSource.ENVIRONMENT


def _is_loopback(host: str) -> bool:
    from loader.serving.http.access import is_loopback

    return is_loopback(host)


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MoeConvertError(
            f"serve needs {' and '.join(missing)}", "pip install 'moe-convert[serve]'"
        )
