"""Bars, notes and log lines on one terminal, and progress without a terminal."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from project_paths import ROOT
from terminal_screen import screen_of

SCRIPT = """
import logging, sys
import click
from converter.cli.show.console import output_options

@click.command()
@output_options(interrupted="nothing")
def command(output):
    log = logging.getLogger("converter.x")
    progress = output.progress()
    for done in range(0, 101, 20):
        progress("converting", done * 10**6, 10**8)
        if done == 20:
            output.note("a note between two bars")
        if done == 40:
            log.warning("a warning of several words that is longer than half of a line of 80")
        if done == 60:
            print("text for stderr", file=sys.stderr)
    counted = output.progress("windows")
    counted("genesis.txt", 3, 3)
    progress("never finished", 1, 10)
    output.result({}, "the result")

command(standalone_mode=False)
"""

BUSY = """
import logging
from converter.cli.show import progress
from converter.cli.show.console import Output
progress.LINE_EVERY_S = 0.001
import sys, threading
output = Output(False, "-q" in sys.argv)
with output.busy("loading x"):
    print("a warning", file=sys.stderr)
    threading.Event().wait(0.05)
output.note("loaded")
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("script") / "progress.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
@pytest.mark.parametrize("columns", [80, 120])
def test_bars_and_lines_never_tear_each_other(script: str, columns: int) -> None:
    screen = screen_of([sys.executable, script], columns)
    lines = [
        re.sub(r"[\d.]+ [kMG]?B/s", "SPEED", re.sub(r"\d+:\d\d:\d\d", "TIME", x)) for x in screen
    ]
    assert lines == [
        "a note between two bars",
        "WARNING: a warning of several words that is longer than half of a line of 80",
        "text for stderr",
        "converting ━━━━━━━━━━━━━━━━━━━━ 100.0/100.0 MB SPEED TIME",
        "genesis.txt ━━━━━━━━━━━━━━━━━━━━ 3/3 windows TIME",
        lines[5],
        "the result",
    ]
    assert re.match("never finished [━╺]+ 1/10 bytes ", lines[5])
    assert max(map(len, screen)) <= columns


def test_without_a_terminal_there_are_lines(script: str) -> None:
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "the result\n"
    lines = [re.sub(r", [\d.]+ MB/s.*", ", SPEED", line) for line in done.stderr.splitlines()]
    assert lines == [
        "converting: 0.0 of 100.0 MB (0 %)",
        "a note between two bars",
        "WARNING: a warning of several words that is longer than half of a line of 80",
        "text for stderr",
        "converting: 100.0 of 100.0 MB (100 %), SPEED",
        "genesis.txt: 3 of 3 windows (100 %)",
        "never finished: 0.0 of 0.0 MB (10 %)",
    ]


def test_quiet_shows_no_progress(script: str) -> None:
    done = subprocess.run(
        [sys.executable, script, "--quiet"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr.splitlines()[1:] == ["text for stderr"]


def test_a_command_that_draws_nothing_does_not_import_rich() -> None:
    code = "import sys; from converter.cli.main import main; import converter.cli.show.console"
    code += "; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("busy") / "busy.py"
    path.write_text(BUSY)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_work_of_unknown_length_leaves_no_trace_on_a_terminal(busy: str) -> None:
    assert screen_of([sys.executable, busy], 80) == ["a warning", "loaded"]


def test_work_of_unknown_length_is_a_line_now_and_then(busy: str) -> None:
    command = [sys.executable, busy]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = set(done.stderr.splitlines())
    assert lines == {"a warning", "loading x: 0 s so far", "loaded"}
    command.append("-q")
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "a warning\n"


TQDM = """
from tqdm.auto import tqdm
from converter.cli.show.console import Output
output = Output(False, False)
with tqdm(total=3, desc="Fetching", bar_format="{desc} {n}/{total}") as bar:
    for number in range(3):
        output.note(f"note {number}")
        bar.update()
output.note("after")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
@pytest.mark.parametrize("columns", [80, 120])
def test_bars_of_huggingface_hub_do_not_tear_notes(tmp_path: Path, columns: int) -> None:
    path = tmp_path / "bars.py"
    path.write_text(TQDM)
    screen = screen_of([sys.executable, str(path)], columns)
    assert screen == ["note 0", "note 1", "note 2", "Fetching 3/3", "after"]
