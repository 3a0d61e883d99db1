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
        check_pip_line(hint)


def check_pip_line(line: str) -> None:
    """Fails if `line` could replace torch, or names an extra that the package does not have."""
    words = shlex.split(line)[2:]
    assert not {"-U", "--upgrade", "--pre"} & set(words), line
    assert "--force-reinstall" not in words or "--no-deps" in words, line
    for extra in re.findall(r"moe-convert\[(\w+)\]", line):
        assert extra in _PROJECT["optional-dependencies"], line
