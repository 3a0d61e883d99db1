"""Noise of libraries on stderr, and lines of ours beside it."""

import subprocess
import sys

import pytest
from project_paths import ROOT

SCRIPT = """
import logging, os, subprocess, sys
from converter.cli.show.console import Output
from converter.cli.show.error_stream import write_line
logging.basicConfig(format="%(message)s")
output = Output(False, False, verbose="-v" in sys.argv)
with output.muted("noisy"):
    print("a library's bar", file=sys.stderr)
    os.write(2, b"native noise\\n")
    subprocess.run([sys.executable, "-c", "import sys; print('a child', file=sys.stderr)"])
    logging.getLogger("noisy").warning("a library's warning")
    output.note("a note")
    write_line("a line")
    print("a result")
print("after", file=sys.stderr)
os.write(2, b"native after\\n")
logging.getLogger("noisy").warning("a later warning")
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_are_muted_unless_verbose(verbose: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, *(["-v"] if verbose else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    ours = ["a note", "a line", "after", "native after", "a later warning"]
    noise = ["a library's bar", "native noise", "a child", "a library's warning"]
    assert done.stdout == "a result\n"
    assert done.stderr.splitlines() == (noise if verbose else []) + ours


def test_an_error_restores_stderr() -> None:
    code = """
from converter.cli.show.error_stream import libraries_muted
try:
    with libraries_muted():
        1 / 0
except ZeroDivisionError:
    import sys; print("shown", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == "shown\n"
