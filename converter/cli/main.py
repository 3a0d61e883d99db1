"""The command group. A command is imported when it runs: help must not wait for torch."""

import contextlib
import difflib
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
    "convert": "Quantize a checkpoint and write a folder whose experts load one by one.",
    "inspect": "Show what a converted model holds.",
    "upload": "Publish a converted folder on the Hub.",
    "download": "Download a converted model from the Hub and check every byte.",
    "export": "Write a converted model as a GGUF file for llama.cpp, ollama and LM Studio.",
    "verify": "Check a converted folder for damage.",
    "repair": "Replace the damaged parts of a converted folder.",
    "plan": "Show what fits in a memory budget, and the speed to expect.",
    "generate": "Generate text with a converted model.",
    "chat": "Chat with a converted model.",
    "serve": "Serve a converted model over HTTP with OpenAI's API.",
    "eval": "Measure perplexity, the difference to the original, or benchmarks.",
    "trace": "Record which experts a text or prompts use.",
    "replay": "Simulate cache policies, sizes and prefetch on a trace.",
    "cache": "List or remove lazily downloaded models.",
    "env": "Show versions, kernels and GPUs.",
}


class _LazyGroup(click.Group):
    """Imports `converter.cli.commands.<name>_command` for the command `<name>`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"converter.cli.commands.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            if near := difflib.get_close_matches(args[0], COMMANDS, 1):
                raise click.UsageError(f"{e.message} Did you mean {near[0]!r}?", ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 error, 2 wrong usage, 3 damage found, 4 does not fit in"
    " memory, 130 interrupted.",
)
@click.version_option(__version__, prog_name="moe-convert")
def cli() -> None:
    """Run mixture-of-experts models that do not fit in memory.

    \b
    moe-convert convert ./my-mixtral -o my-mixtral-2bit
    moe-convert generate my-mixtral-2bit --prompt "Once upon a time"
    moe-convert chat my-mixtral-2bit

    \b
    Shell completion (also zsh_source, fish_source):
    eval "$(_MOE_CONVERT_COMPLETE=bash_source moe-convert)"
    """


def main(args: list[str] | None = None) -> Any:
    """Run the command line and exit with its code."""
    with safe_terminal(), _terminate_as_interrupt():
        code = _run(args)
    sys.exit(code)


def _run(args: list[str] | None) -> Any:
    """Run a command and return its exit code. Every error becomes one message and a next step."""
    try:
        code = cli.main(args=args, prog_name="moe-convert", standalone_mode=False) or 0
        # At exit Python would print a traceback for a failed flush and exit with 120.
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
        # Python would flush the rest at exit and fail again.
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
    return failure.exit_code


def _drop_output() -> None:
    """Redirect stdout, which has no reader any more, so that the flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM stop a command as Ctrl-C does: files are closed, and the message says how to
    resume.
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
