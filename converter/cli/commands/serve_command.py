"""`moe-convert serve`: serves a converted model over HTTP with OpenAI's API."""

import importlib.util
from pathlib import Path
from typing import Any

import click

from converter.cli.options import shared_options
from converter.cli.options.api_key import KEY_VARIABLE, read_api_key, with_api_key
from converter.cli.options.model_options import with_model_options
from converter.cli.show.console import Output, output_options
from converter.cli.steps.model_loading import early_tokenizer
from converter.cli.steps.model_server import ModelServerOptions, open_server, run_server
from formats.errors import MoeConvertError
from formats.install import install_extra
from formats.sizes import format_size

_PACKAGES = ("fastapi", "uvicorn")


@click.command(
    "serve",
    epilog="""\b
Examples:
  moe-convert serve mixtral-2bit
  moe-convert serve mixtral-2bit --ram-cache 8GiB --max-context 4096
  MOE_CONVERT_API_KEY=... moe-convert serve mixtral-2bit --host 0.0.0.0
  curl http://127.0.0.1:8000/v1/completions \\
    -H 'Content-Type: application/json' \\
    -d '{"model": "mixtral-2bit", "prompt": "Hi", "max_tokens": 32}'

Ctrl-C or SIGTERM stops the server within 10 seconds. A running answer has
5 seconds to finish.""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on. Any address but loopback needs a key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 is any free port.",
)
@with_api_key("Key that every request must send.")
@click.option(
    "--model-name",
    metavar="NAME",
    help="Model name for clients [default: the last part of PATH].",
)
@shared_options.max_context(2, "the model's maximum, but at most 8192")
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    metavar="N",
    help="Number of requests that may wait while one runs. Further requests get status 429.",
)
@shared_options.prefix_cache(
    "1GiB",
    "Memory for KV caches of finished answers; the next turn of a conversation reuses them. 0 keeps"
    " none.",
)
@shared_options.template
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of a web page that may send requests. Repeat the option for more origins.",
)
@with_model_options
@output_options(interrupted="the server had not started; run the same command again")
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
    """Serve the converted model PATH over HTTP with OpenAI's API.

    PATH is a folder, or owner/name of a repository on the Hub. Routes: /v1/chat/completions,
    /v1/completions, /v1/models, /health, /metrics (Prometheus). The server generates one answer at
    a time, first come, first served. It rejects unsupported parameters with status 400 and their
    name. docs/clients.md lists tested clients and supported parameters.
    """
    key = read_api_key(api_key, api_key_file)
    _check_packages()
    if key is None and not _is_loopback(host):
        raise click.UsageError(
            f"--host {host} needs a key: set {KEY_VARIABLE}, or give --api-key-file FILE"
        )
    from loader.evaluation.perplexity import read_text
    from loader.serving.http.app import AppOptions, build_app
    from loader.serving.prompts.chat_template import has_template

    text = read_text(template) if template else None
    tokenizer = early_tokenizer(path, options["check"])
    address = ModelServerOptions(host, port, max_context, max_queue, prefix_cache)
    server = open_server(path, tokenizer, address, options, output)
    tokenizer = server.loaded.tokenizer
    name = model_name or path.resolve().name
    app = build_app(server.engine, tokenizer, AppOptions(name, key, cors, text))
    context = server.limits.max_context
    if output.as_json:
        output.result({"url": server.url, "model": name, "max_context": context}, "")
    output.note(
        f"serving {name!r} on {server.url}/v1: {context} tokens of context,"
        f" {format_size(prefix_cache)} of prefix caches, {'with' if key else 'without'} a key;"
        " Ctrl-C stops the server"
    )
    if not (text or has_template(tokenizer)):
        output.note(
            "The tokenizer has no chat template: only /v1/completions works."
            " --template FILE gives one."
        )
    run_server(app, server.engine, server.listening, output)
    server.loaded.experts.report()


def _is_loopback(host: str) -> bool:
    from loader.serving.http.access import is_loopback

    return is_loopback(host)


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MoeConvertError(f"serve needs {' and '.join(missing)}", install_extra("serve"))
