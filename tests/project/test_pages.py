"""Pages: links and anchors resolve, tables are tables, named files and sections exist."""

import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from project_paths import ROOT

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md", "tests/vectors/*.md")
    for page in ROOT.glob(pattern)
)
ROOMS = "loader|converter|formats|tests|bench|docs|examples"
# Not in the middle of a longer path or address.
PATH = re.compile(rf"(?<![\w./~-])(?:{ROOMS})/[\w./-]*[\w/]")
# As in comments: docs/format.md, "Packings" or docs/numerics.md ("One product").
SECTION = re.compile(r"(docs/[\w-]+\.md),? \(?\"([^\"]+)\"")
COMMENT = re.compile(r"\s+(?:#|//|\*)?\s*")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


@cache
def headings(page: Path) -> list[str]:
    """Titles of a page's sections, without code marks."""
    parsed = tokens(page)
    return [
        "".join(part.content for part in parsed[i + 1].children or [])
        for i, token in enumerate(parsed)
        if token.type == "heading_open"
    ]


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = (c for c in title.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def links(page: Path) -> list[str]:
    targets = []
    for token in tokens(page):
        for part in token.children or []:
            target = part.attrs.get("href") or part.attrs.get("src")
            if target and not re.match(r"[a-z]+:", str(target)):
                targets.append(str(target))
    return targets


def cells(row: str) -> int:
    """Cells of a table's row: a bar counts inside code too, unless a backslash stands before it."""
    return len(re.findall(r"(?<!\\)\|", row.strip().strip("|"))) + 1


@every_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if fragment:
            assert fragment in map(anchor, headings(target)), link


@every_page
def test_every_table_is_a_table_with_equal_rows(page: Path) -> None:
    lines = page.read_text().splitlines()
    elsewhere = set(range(len(lines)))
    for token in tokens(page):
        if token.type in ("table_open", "fence", "code_block"):
            assert token.map
            begin, end = token.map
            elsewhere.difference_update(range(begin, end))
        if token.type == "table_open":
            rows = [line for line in lines[begin:end] if line.strip()]
            assert [row for row in rows if cells(row) != cells(rows[0])] == []
    assert [lines[i] for i in sorted(elsewhere) if lines[i].startswith("|")] == []


@every_page
def test_every_path_in_a_page_exists(page: Path) -> None:
    named = PATH.findall(page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("room", ["loader", "converter", "formats", "tests"])
def test_sections_that_the_code_refers_to_exist(room: str) -> None:
    missing = []
    for file in sorted((ROOT / room).rglob("*")):
        if file.suffix not in (".py", ".h", ".cpp", ".cu", ".cuh", ".txt") or file == Path(
            __file__
        ):
            continue
        text = COMMENT.sub(" ", file.read_text())
        for page, title in SECTION.findall(text):
            known = headings(ROOT / page) if (ROOT / page).exists() else []
            # "bf16 linear" stands for "bf16 linear (lm_head)".
            if not any(heading.startswith(title) for heading in known):
                missing.append((str(file.relative_to(ROOT)), page, title))
    assert missing == []
