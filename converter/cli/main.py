"""The command group. Commands are imported when they run, so that help comes without loading torch."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from converter import __version__
from converter.cli.show.console import Interrupted, Terminated
from converter.cli.show.failures import failure_of, is_closed_pipe
from converter.cli.show.terminal import one_line, safe_terminal

INTERRUPTED_CODE = 130

COMMANDS = {
    "convert": "Quantize a mixture-of-experts checkpoint and write it in the expert-addressable format.",
    "inspect": "Show what a converted folder holds, from its index and headers.",
    "upload": "Publish a converted folder on the Hub, with a model card, in one commit.",
    "download": "Fetch a converted model from the Hub, and check every byte.",
    "verify": "Check a converted folder: structure, and on request every byte.",
    "repair": "Mend what verify finds, from a repository or the source: only the damaged experts.",
    "plan": "Show what fits where within a memory budget, and the speed to expect.",
    "generate": "Generate text with a converted model.",
    "chat": "Talk with a converted model.",
    "serve": "Serve a converted model over HTTP, as OpenAI's interface describes it.",
    "eval": "Measure perplexity of a converted folder or an ordinary checkpoint.",
    "trace": "Record which experts a text or prompts use.",
    "replay": "Replay a trace: cache policies, slots and prefetch, and what is possible at best.",
    "env": "Show versions and which kernels are in use.",
}


class _LazyGroup(click.Group):
    """Loads `converter.cli.<name>_command` for the command `<name>`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"converter.cli.commands.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 damage found, 4 does not fit, 130 interrupted.",
)
@click.version_option(__version__, prog_name="moe-convert")
def cli() -> None:
    """Run mixture-of-experts models on hardware that they don't fit on.

    \b
    moe-convert convert ./my-mixtral -o my-mixtral-2bit
    moe-convert generate my-mixtral-2bit --prompt "Once upon a time"
    moe-convert chat my-mixtral-2bit

    Shell completion: eval "$(_MOE_CONVERT_COMPLETE=bash_source moe-convert)", likewise zsh_source
    and fish_source.
    """


def main(args: list[str] | None = None) -> Any:
    """Runs the command line and exits with its code."""
    with safe_terminal(), _terminate_as_interrupt():
        code = _run(args)
    sys.exit(code)


def _run(args: list[str] | None) -> Any:
    """The exit code. Every error is one message and a next step, never a traceback."""
    try:
        code = cli.main(args=args, prog_name="moe-convert", standalone_mode=False) or 0
        # Here, since Python would only print a traceback and exit with 120.
        sys.stdout.flush()
        return code
    except SystemExit as e:
        return e.code
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except Interrupted as e:
        click.echo(f"interrupted: {e}", err=True)
        return INTERRUPTED_CODE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED_CODE
    except Exception as e:
        if is_closed_pipe(e):
            _drop_output()
            return 1
        return _report(e)


def _report(error: Exception) -> int:
    failure = failure_of(error)
    lines = [f"error: {one_line(failure.message)}"]
    if failure.hint:
        lines.append(f"  next: {one_line(failure.hint)}")
    with contextlib.suppress(OSError):
        click.echo("\n".join(lines), err=True)
    if isinstance(error, OSError):
        # What stdout could not take would be tried again at exit.
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
    return failure.exit_code


def _drop_output() -> None:
    """Nothing reads stdout any more: what Python still has for it must not fail at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM stops a command as Ctrl-C does, so that files are closed and the message says how to
    go on.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
