"""Pointers into the code: a file that a table of docs/design.md or docs/architecture.md names
exists and defines the symbols named after it.

PYTHONPATH=tests/support python tests/project/test_design_pointers.py     follows files that moved
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from project_paths import ROOT

PAGES = ("docs/design.md", "docs/architecture.md")
REPAIR = "PYTHONPATH=tests/support python tests/project/test_design_pointers.py"
LAST_HEADER = "file and symbol"
"""Last column of the tables that hold pointers."""
DEFINITION = r"(?:#define|struct|class|enum class|enum|[\w:<>*&]+)\s+{}\b"
"""A definition in C++."""


@dataclass(frozen=True)
class Pointer:
    """The claim of a row that `file` defines `symbol`."""

    page: str
    line: int
    file: str
    symbol: str

    def error(self) -> str | None:
        """Return the problem and the next step; None if the claim is true."""
        path = ROOT / self.file
        is_gone = not path.is_file()
        if not is_gone and defines(path, self.symbol):
            return None
        problem = "does not exist" if is_gone else f"does not define {self.symbol}"
        others = files_that_define(self.symbol)
        where = f"{self.symbol} is in {', '.join(others)}" if others else f"no {self.symbol} exists"
        step = f"run {REPAIR}" if is_gone and len(others) == 1 else "edit that row"
        return f"{self.page}, line {self.line}: {self.file} {problem}; {where}; {step}"


@cache
def defined(path: Path) -> set[str]:
    """Names that a Python file defines at its top level, and methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.ClassDef():
                names.add(node.name)
                names |= {
                    f"{node.name}.{member.name}"
                    for member in node.body
                    if isinstance(member, ast.FunctionDef)
                }
            case ast.FunctionDef():
                names.add(node.name)
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def defines(path: Path, symbol: str) -> bool:
    if path.suffix == ".py":
        return symbol in defined(path)
    return bool(re.search(DEFINITION.format(re.escape(symbol)), path.read_text()))


def files_that_define(symbol: str) -> list[str]:
    """Python files of the packages that define `symbol`, relative to the root."""
    packages = ("converter", "formats", "loader")
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return [str(path.relative_to(ROOT)) for path in paths if defines(path, symbol)]


def rows(page: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and code spans of the last cell, for each row of the tables with pointers."""
    lines = (ROOT / page).read_text().splitlines()
    for token in MarkdownIt("commonmark").enable("table").parse("\n".join(lines)):
        if token.type != "table_open" or token.map is None:
            continue
        begin, end = token.map
        if lines[begin].strip("| ").split("|")[-1].strip() != LAST_HEADER:
            continue
        for number in range(begin + 2, end):
            yield number + 1, re.findall("`([^`]+)`", lines[number].strip("| ").split("|")[-1])


def pointers(page: str) -> Iterator[Pointer]:
    """Pointers of a page. A span with a slash is a file; the spans after it are its symbols."""
    for line, spans in rows(page):
        file = ""
        for span in spans:
            if "/" in span:
                file = span
            else:
                yield Pointer(page, line, file, span)


def follow_moves(page: str) -> list[str]:
    """Edit the page: a file that has gone becomes the only file that defines its symbol.

    Returns the errors that remain.
    """
    path = ROOT / page
    for pointer in list(pointers(page)):
        others = files_that_define(pointer.symbol)
        if not (ROOT / pointer.file).is_file() and len(others) == 1:
            path.write_text(path.read_text().replace(pointer.file, others[0]))
    return [error for pointer in pointers(page) if (error := pointer.error())]


@pytest.mark.parametrize("page", PAGES)
def test_each_pointer_leads_to_a_definition(page: str) -> None:
    errors = [error for pointer in pointers(page) if (error := pointer.error())]
    assert not errors, "\n" + "\n".join(errors)


@pytest.mark.parametrize("page", PAGES)
def test_each_row_begins_with_a_file_and_each_file_has_a_symbol(page: str) -> None:
    found = list(rows(page))
    assert found
    for line, spans in found:
        kinds = "".join("f" if "/" in span else "s" for span in spans)
        assert re.fullmatch("(fs+)+", kinds), f"{page}, line {line}: {spans}"


def test_a_wrong_pointer_says_where_its_symbol_is_defined() -> None:
    gone = Pointer("page", 1, "formats/gone.py", "Artifact").error()
    assert gone and "formats/gone.py does not exist; Artifact is in formats/artifact.py" in gone
    moved = Pointer("page", 1, "formats/index.py", "Artifact").error()
    assert moved and "does not define Artifact; Artifact is in formats/artifact.py" in moved


if __name__ == "__main__":
    remaining = [error for page in PAGES for error in follow_moves(page)]
    print("\n".join(remaining), file=sys.stderr)
    sys.exit(bool(remaining))
