"""The command group. Commands are imported when they run, so that help comes without loading torch."""

import importlib
import sys
from typing import Any

import click

from converter import __version__
from formats.errors import MoeConvertError

COMMANDS = {
    "convert": "Quantize a Mixtral checkpoint and write it in the expert-addressable format.",
    "inspect": "Show what a converted folder holds, from its index and headers.",
    "upload": "Publish a converted folder on the Hub, with a model card, in one commit.",
    "download": "Fetch a converted model from the Hub, and check every byte.",
    "verify": "Check a converted folder: structure, and on request every byte.",
    "repair": "Mend what verify finds, from a repository or the source: only the damaged experts.",
    "plan": "Show what fits where within a memory budget, and the speed to expect.",
    "generate": "Generate text with a converted model.",
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
        module = importlib.import_module(f"converter.cli.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 damage found, 4 does not fit, 130 interrupted (run again).",
)
@click.version_option(__version__, prog_name="moe-convert")
def cli() -> None:
    """Run Mixtral models on hardware that they don't fit on.

    \b
    moe-convert convert ./my-mixtral -o my-mixtral-2bit
    moe-convert generate my-mixtral-2bit --prompt "Once upon a time"

    Shell completion: eval "$(_MOE_CONVERT_COMPLETE=bash_source moe-convert)", likewise zsh_source and fish_source.
    """


def main(args: list[str] | None = None) -> Any:
    """Runs the command line and exits with its code."""
    try:
        cli.main(args=args, prog_name="moe-convert", standalone_mode=False)
    except MoeConvertError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted: run the same command again to go on", err=True)
        sys.exit(130)
    sys.exit(0)
