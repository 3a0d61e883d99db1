"""The help of every command fits a terminal of 80 columns."""

from collections.abc import Callable

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


@pytest.mark.parametrize(("typed", "meant"), [("plna", "plan"), ("converter", "convert")])
def test_a_mistyped_command_names_the_nearest(
    run_command: Callable[..., tuple[int, str, str]], typed: str, meant: str
) -> None:
    code, _, err = run_command(typed)
    assert code == 2
    assert f"No such command '{typed}'. Did you mean '{meant}'?" in err


def test_another_word_names_no_command(run_command: Callable[..., tuple[int, str, str]]) -> None:
    assert "Did you mean" not in run_command("xxxxxx")[2]
