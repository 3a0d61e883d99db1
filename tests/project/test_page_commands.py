"""Shell commands in pages: each names a command, options and make targets that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from markdown_it import MarkdownIt
from project_paths import ROOT

from converter.cli.main import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELLS = ("", "sh", "bash", "console")
PROMPT = "$ "
TARGET = re.compile(r"\bmake ([a-z][a-z-]*)")


def shell_lines(page: Path) -> Iterator[str]:
    """Lines of code blocks that have no language or a shell's, without prompts and comments."""
    if page.name == "commands.md":
        return  # It is written from --help.
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "fence" and token.info in SHELLS:
            for line in token.content.splitlines():
                yield line.removeprefix(PROMPT)


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}")
    for page in PAGES
    if page.exists()
    for line in shell_lines(page)
    if line.startswith("moe-convert ")
]


def parse(line: str) -> None:
    """Parse a command line as click does. Raises click.UsageError."""
    _, name, *arguments = shlex.split(line, comments=True)
    # click keeps a command's help option: without these settings it would lack -h in later tests.
    context = click.Context(cli, **cli.context_settings)
    command = cli.get_command(context, name)
    if command is None:
        raise click.UsageError(f"{name} is no command")
    child = click.Context(command, info_name=name, parent=context)
    command.make_parser(child).parse_args(arguments)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_in_a_page_has_options_that_exist(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", ["moe-convert chant x", "moe-convert chat x --chant"])
def test_a_wrong_command_in_a_page_is_found(line: str) -> None:
    with pytest.raises(click.UsageError, match="chant"):
        parse(line)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_a_make_target_in_a_page_exists(page: str) -> None:
    named = set(TARGET.findall((ROOT / page).read_text()))
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert named
    assert named - targets == set()
