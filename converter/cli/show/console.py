"""Output of the commands: --json, -q, -v, logging, progress, tables.

Results go to stdout, everything else to stderr.
"""

import json
import logging
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import click

from converter.cli.show.error_stream import libraries_muted, write_line
from converter.cli.show.failures import is_closed_pipe
from converter.cli.show.progress import (
    NoProgress,
    ShowProgress,
    show_busy,
    show_progress,
)
from converter.cli.show.tables import folded
from converter.cli.show.terminal import printable
from formats.errors import MoeConvertError
from formats.files.io_errors import AGAIN

F = TypeVar("F", bound=Callable[..., Any])

GB = 10**9


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. It ends even a command that continues after Ctrl-C."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended a command. The text says what is left and how to resume."""


def output_options(interrupted: str, *, has_json: bool = True) -> Callable[[F], F]:
    """Add --json, --quiet and --verbose. The command gets them as one argument `output: Output`.

    interrupted: what Ctrl-C leaves, and how to resume. has_json: False for a command without a
    result.
    """
    json_option: Callable[[F], F] = click.option(
        "--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout."
    )

    def decorate(function: F) -> F:
        @(json_option if has_json else _unchanged)
        @click.option("-q", "--quiet", is_flag=True, help="Show no progress, and only warnings.")
        @click.option(
            "-v",
            "--verbose",
            is_flag=True,
            help="Show more log lines, and the traceback of an error.",
        )
        def wrapper(
            *args: Any, quiet: bool, verbose: bool, as_json: bool = False, **kwargs: Any
        ) -> Any:
            level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
            logging.basicConfig(
                level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_LogLines()]
            )
            for room in ("converter", "formats", "loader"):
                logging.getLogger(room).setLevel(level)
            output = Output(as_json, quiet, interrupted, verbose=verbose)
            try:
                return function(*args, output=output, **kwargs)
            except (KeyboardInterrupt, click.Abort):
                raise Interrupted(output.interrupted) from None
            except click.ClickException:
                raise
            except BrokenPipeError as e:
                # click would exit silently, also if a network connection broke.
                if is_closed_pipe(e):
                    raise
                raise MoeConvertError(f"the other end closed the connection: {e}", AGAIN) from e
            except Exception:
                output.close()
                if verbose:
                    click.echo(printable(traceback.format_exc()), err=True)
                raise
            finally:
                output.close()

        options = [
            *getattr(wrapper, "__click_params__", []),
            *getattr(function, "__click_params__", []),
        ]
        wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
        wrapper.__click_params__ = options  # type: ignore[attr-defined]
        return wrapper  # type: ignore[return-value]

    return decorate


def _unchanged(function: F) -> F:
    return function


class Output:
    """The output of one command. interrupted: what Ctrl-C would leave now, and how to resume."""

    def __init__(
        self, as_json: bool, quiet: bool, interrupted: str = "", *, verbose: bool = False
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.interrupted = interrupted
        self._verbose = verbose
        self._shown: list[ShowProgress] = []

    def result(self, value: Any, text: str) -> None:
        """Print the result: `value` as JSON with --json, else `text`."""
        self.close()
        click.echo(
            json.dumps(value, indent=1, default=str) if self.as_json else folded(printable(text))
        )

    def note(self, text: str) -> None:
        """Print a line on stderr, unless --quiet is given."""
        if not self.quiet:
            write_line(folded(printable(text)))

    def progress(self, unit: str | None = None) -> ShowProgress:
        """Return a callback (stage, done, total) that shows progress on stderr.

        unit: what is counted, such as "windows"; None is bytes. The callback draws a bar on a
        terminal, prints lines elsewhere, and does nothing with --quiet.
        """
        progress = NoProgress() if self.quiet else show_progress(unit)
        self._shown.append(progress)
        return progress

    def busy(self, text: str) -> AbstractContextManager[None]:
        """Return a context that shows `text` and the time while it lasts, unless --quiet."""
        return nullcontext() if self.quiet else show_busy(text)

    def muted(self, *loggers: str) -> AbstractContextManager[None]:
        """Return a context that drops what libraries write to stderr, unless --verbose.

        loggers: names of loggers whose warnings are dropped too.
        """
        return nullcontext() if self._verbose else libraries_muted(*loggers)

    def close(self) -> None:
        """End all bars, so that nothing else is drawn over them."""
        for progress in self._shown:
            progress.close()


class _LogLines(logging.Handler):
    """Writes log lines above a bar: rich replaces sys.stderr while one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            write_line(self.format(record))
        except Exception:
            self.handleError(record)
