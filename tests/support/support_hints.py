"""Checks of hints in messages: a command parses, a package's extra exists."""

import re
import shlex
import tomllib

import click
from project_paths import ROOT

from converter.cli.main import COMMANDS, cli

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def hints_in(text: str) -> list[str]:
    """Return the texts after each "next:" in a command's output."""
    return re.findall(r"^  next: (.+)$", text, re.M)


def arguments_of(hint: str) -> list[str]:
    """The arguments of a hint that is a command of ours, as a shell would pass them."""
    program, *arguments = shlex.split(hint, comments=True)
    assert program == "moe-convert", hint
    return arguments


def check_hint(hint: str) -> None:
    """Fails if `hint` is a command that would be refused for how it is written."""
    if hint.startswith("moe-convert "):
        name, *arguments = arguments_of(hint)
        assert name in COMMANDS, hint
        # The settings too: click keeps the help option that a command has first.
        context = click.Context(cli, info_name="moe-convert", **cli.context_settings)
        command = cli.get_command(context, name)
        assert command
        # Raises for options that the command does not have.
        child = click.Context(command, info_name=name, parent=context)
        _, rest, _ = command.make_parser(child).parse_args(list(arguments))
        assert not rest, hint
    elif hint.startswith("pip install"):
        *_, package = shlex.split(hint)
        extra = re.fullmatch(r"moe-convert\[(\w+)\]", package)
        assert extra and extra[1] in _PROJECT["optional-dependencies"], hint
