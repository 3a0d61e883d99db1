"""The help of every command fits a terminal of 80 columns."""

import click
import pytest

from converter.cli.main import COMMANDS, cli

COLUMNS = 80


@pytest.mark.parametrize("name", list(COMMANDS))
def test_no_line_of_help_wraps_at_80_columns(name: str) -> None:
    parent = click.Context(cli, info_name="moe-convert", **cli.context_settings)
    command = cli.get_command(parent, name)
    assert command
    text = command.get_help(
        click.Context(command, info_name=name, parent=parent, terminal_width=COLUMNS)
    )
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_has_a_help_text(name: str) -> None:
    parent = click.Context(cli, info_name="moe-convert", **cli.context_settings)
    command = cli.get_command(parent, name)
    assert command
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert [option.name for option in options if not option.help] == []
