"""Documents are correct: the page of commands, the README's Python, links.

PYTHONPATH=tests/support python tests/project/test_docs.py     writes docs/commands.md again
"""

import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from project_paths import ROOT

from converter.cli.main import COMMANDS, cli

PAGE = ROOT / "docs" / "commands.md"


def commands_page() -> str:
    """Return the expected docs/commands.md: the help of every command."""
    context = click.Context(
        cli, info_name="moe-convert", terminal_width=100, **cli.context_settings
    )
    parts = [
        "# Commands\n\nWritten by `python tests/project/test_docs.py` from the commands' help.\n"
    ]
    parts.append(f"```\n{cli.get_help(context)}\n```\n")
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command
        child = click.Context(command, info_name=name, parent=context, terminal_width=100)
        parts.append(f"## {name}\n\n```\n{command.get_help(child)}\n```\n")
    return "\n".join(parts)


def test_page_of_commands_is_what_help_says() -> None:
    assert PAGE.read_text() == commands_page(), (
        "run PYTHONPATH=tests/support python tests/project/test_docs.py"
    )


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_readme_python_runs_as_it_stands(
    converted: "object", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    folder = converted("2bit")  # type: ignore[operator]
    exec(compile(code.replace("out/tiny-mixtral-2bit", str(folder)), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "So Jonah arose, and went to" in shown
    assert "misses=" in shown


@pytest.mark.parametrize("number", [0, 1])
def test_python_of_the_page_on_loading_runs_as_it_stands(converted: Any, number: int) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "load.md").read_text(), re.S)[number]
    if "lm_eval" in code:
        pytest.importorskip("lm_eval")
    folder = converted("2bit")
    names: dict[str, Any] = {}
    exec(compile(code.replace("out/tiny-mixtral-2bit", str(folder)), "load.md", "exec"), names)
    model: Any = names["model"]
    # Of lm-eval's object, the model in it.
    assert (model if hasattr(model, "moe_stats") else model.model).moe_stats().slots


if __name__ == "__main__":
    PAGE.write_text(commands_page())
    sys.exit(0)
