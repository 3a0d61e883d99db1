"""Tables and sentences fit the terminal; files and pipes get whole lines."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from project_paths import EXAMPLE
from terminal_screen import screen_of

from converter.cli.show.tables import folded, table

ROWS = [("text", "first", "second", "third"), ("a.txt", "1.25", "2.5", "33333.125")]
Set = Callable[[int | None], None]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Set the terminal's columns; None: no terminal."""

    def set_columns(columns: int | None) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: columns is not None)
        monkeypatch.setattr("sys.stderr.isatty", lambda: False)
        size = os.terminal_size((columns or 80, 24))
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_: size)

    return set_columns


@pytest.mark.parametrize("columns", [None, 31])
def test_a_table_that_fits_is_one(terminal: Set, columns: int | None) -> None:
    terminal(columns)
    assert table(ROWS).splitlines() == [
        "text   first  second      third",
        "a.txt   1.25     2.5  33333.125",
    ]


def test_columns_that_do_not_fit_stand_below_with_the_rows_names(terminal: Set) -> None:
    terminal(30)
    assert table(ROWS).splitlines() == [
        "text   first  second",
        "a.txt   1.25     2.5",
        "",
        "text       third",
        "a.txt  33333.125",
    ]


def test_a_long_last_cell_is_wrapped_under_itself(terminal: Set) -> None:
    terminal(30)
    rows = [("kernels", "native, AVX-512 and two threads"), ("gpu", "none")]
    assert table(rows, left=2).splitlines() == [
        "kernels  native, AVX-512 and",
        "         two threads",
        "gpu      none",
    ]


def test_sentences_are_wrapped_and_rows_stay(terminal: Set) -> None:
    text = "one two three four five\na  row  of  a  table  with  gaps"
    terminal(12)
    assert folded(text) == "one two\nthree four\nfive\na  row  of  a  table  with  gaps"
    terminal(None)
    assert folded(text) == text


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "FOLDER"],
        ["plan", "FOLDER", "--disk", "2", "--memory", "10"],
        ["plan", "FOLDER", "--ram", "1GiB", "--disk", "2", "--memory", "10"],
    ],
    ids=" ".join,
)
def test_results_fit_the_screen(
    converted: Callable[[str], Path], arguments: list[str], columns: int
) -> None:
    words = [str(converted("2bit")) if word == "FOLDER" else word for word in arguments]
    command = [sys.executable, "-m", "converter", *words]
    wide = screen_of(command, 400, rows=60)
    screen = screen_of(command, columns, rows=60)
    # The terminal itself would wrap in the middle of words.
    assert " ".join(screen).split() == " ".join(wide).split()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_a_comparison_is_folded_at_80_columns(converted: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "converter", "eval", str(converted("2bit")), "--against"]
    command += [str(EXAMPLE), "--text", str(EXAMPLE.parent / "text" / "english.txt")]
    screen = screen_of([*command, "--max-windows", "1", "-q"], 80, rows=60)
    heads = [line.split() for line in screen if line.startswith("text ")]
    assert [head[0] for head in heads] == ["text", "text"]
    assert heads[0][1] == "tokens" and heads[1][-1] == "experts"
    assert max(map(len, screen)) <= 80
