"""`moe-convert env`: which kernels run, why, and the command that builds them."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from project_paths import ROOT
from support_hints import check_pip_line

from converter.solvers.native import solver_library
from loader.arithmetic import kernels

Run = Callable[..., tuple[int, str, str]]
LIBRARIES = {"kernels": "libmoe_kernels.so", "solver": "libmoe_solver.so"}
WITHOUT_LIBRARIES = """
import formats.native.libraries as libraries
libraries.load_library = lambda room, name, *rest: (None, f"{name} is not built")
from converter.cli.main import main
main(["env", "--json"])
"""


def test_versions_wheel_and_reinstall_line_are_shown(run_command: Run) -> None:
    code, text, _ = run_command("env", "--json")
    assert code == 0
    shown = json.loads(text)
    assert shown["torch"].startswith("2.")
    assert shown["wheel"].startswith("py3-none-")
    assert shown["reinstall"].startswith("pip install ")
    check_pip_line(shown["reinstall"])


@pytest.mark.skipif(
    not (kernels.available() and solver_library.available()), reason="no native libraries"
)
def test_native_libraries_are_shown_with_instruction_set_and_path(run_command: Run) -> None:
    kernels.set_isa("portable")
    try:
        shown = json.loads(run_command("env", "--json")[1])
    finally:
        kernels.set_isa("auto")
    assert "portable" in shown["kernels"]
    for part, library in LIBRARIES.items():
        assert shown[part].startswith("native, ")
        assert f"/{library}" in shown[part]


def test_torch_is_shown_with_reason_and_command_if_libraries_are_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARIES], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    for part, library in LIBRARIES.items():
        assert shown[part].startswith("torch (slow): ")
        assert f"{library} is not built" in shown[part]
        assert shown[part].endswith(f"reinstall: {shown['reinstall']}")
