"""The options --api-key and --api-key-file: the key of a server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from converter.cli.options import shared_options
from formats.errors import MoeConvertError

F = TypeVar("F", bound=Callable[..., Any])

KEY_VARIABLE = "MOE_CONVERT_API_KEY"
_ENVIRONMENT = click.core.ParameterSource.ENVIRONMENT


def with_api_key(text: str) -> Callable[[F], F]:
    """Add --api-key and --api-key-file. text: what the key is for."""

    def decorate(function: F) -> F:
        function = click.option(
            "--api-key-file",
            type=shared_options.FILE,
            metavar="FILE",
            help="File that holds the key.",
        )(function)
        return click.option(
            "--api-key",
            envvar=KEY_VARIABLE,
            metavar="KEY",
            help=f"{text} Better set {KEY_VARIABLE}: other users can see the command line.",
        )(function)

    return decorate


def read_api_key(given: str | None, file: Path | None) -> str | None:
    """Return the key from --api-key, its environment variable or --api-key-file."""
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
            raise MoeConvertError(f"{file}: expected a key in UTF-8: {e}") from None
    if key is None:
        return None
    if not key.strip() or not key.isascii() or any(c.isspace() for c in key):
        raise click.UsageError("the API key must be ASCII without spaces, and not empty")
    return key
