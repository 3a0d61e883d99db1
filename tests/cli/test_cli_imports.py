"""Commands that only read index and headers start fast: they import no heavy package."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "matplotlib", "fastapi", "rich")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["verify"],
        ["verify", "--read-data"],
        ["plan", "--ram", "1GiB", "--disk", "1", "--memory", "10"],
    ],
    ids=" ".join,
)
def test_light_commands_import_no_heavy_package(
    arguments: list[str], converted: Callable[[str], Path]
) -> None:
    name, *options = arguments
    code = (
        "import sys\n"
        "from converter.cli.main import cli\n"
        f"cli({[name, str(converted('2bit')), *options]!r}, standalone_mode=False)\n"
        f"print([module for module in {HEAVY!r} if module in sys.modules], file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr.splitlines()[-1:]) == (0, ["[]"]), run.stderr


@pytest.mark.parametrize("name", ["inspect", "verify", "plan", "replay"])
def test_help_of_light_commands_does_not_import_torch(name: str) -> None:
    code = (
        "import sys\n"
        "from converter.cli.main import cli\n"
        f"cli([{name!r}, '--help'], standalone_mode=False)\n"
        "print([module for module in ('torch', 'transformers') if module in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["[]"], run.stderr
