"""Pointers into the code: a file that a table of docs/design.md or docs/architecture.md names
exists and defines the symbols named after it.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from project_paths import ROOT

PAGES = ("docs/design.md", "docs/architecture.md")
LAST_HEADER = "file and symbol"
"""Last column of the tables that hold pointers."""
DEFINITION = r"(?:#define|struct|class|enum class|enum|[\w:<>*&]+)\s+{}\b"
"""A definition in C++."""


@dataclass(frozen=True)
class Pointer:
    """A row's claim: `file` defines `symbol`."""

    place: str
    file: str
    symbol: str

    def error(self) -> str | None:
        """Return what is wrong with the pointer, and what to edit; None if it holds."""
        path = ROOT / self.file
        if not path.is_file():
            others = sorted(str(p.relative_to(ROOT)) for p in files_that_define(self.symbol))
            where = f"{self.symbol} is defined in {', '.join(others)}" if others else "it is gone"
            return f"{self.place}: {self.file} does not exist; {where}. Edit that row."
        if not defines(path, self.symbol):
            others = sorted(str(p.relative_to(ROOT)) for p in files_that_define(self.symbol))
            where = f"it is defined in {', '.join(others)}" if others else "no file defines it"
            return (
                f"{self.place}: {self.file} does not define {self.symbol}; {where}. Edit that row."
            )
        return None


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


def files_that_define(symbol: str) -> list[Path]:
    packages = ("converter", "formats", "loader")
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return [path for path in paths if defines(path, symbol)]


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
                yield Pointer(f"{page}, line {line}", file, span)


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
    renamed = Pointer("page, line 1", "formats/gone.py", "Artifact").error()
    assert renamed and "formats/gone.py does not exist" in renamed
    assert "formats/artifact.py" in renamed
    moved = Pointer("page, line 1", "formats/index.py", "Artifact").error()
    assert moved and "does not define Artifact; it is defined in formats/artifact.py" in moved
