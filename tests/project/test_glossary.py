"""docs/glossary.md: each term has one meaning and is used in the code."""

import re
from collections import Counter
from functools import cache

import pytest
from project_paths import ROOT

TERMS = re.findall(
    r"^\| (?!term \|)([A-Za-z][\w -]*) \| ", (ROOT / "docs" / "glossary.md").read_text(), re.M
)


@cache
def code() -> str:
    """The Python sources of all packages, in lower case."""
    packages = ("formats", "converter", "loader")
    files = (file for package in packages for file in (ROOT / package).rglob("*.py"))
    return "\n".join(file.read_text().lower() for file in files)


def test_a_term_has_one_row() -> None:
    assert len(TERMS) > 50
    assert [term for term, count in Counter(TERMS).items() if count > 1] == []


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_used_in_the_code(term: str) -> None:
    words = r"[\s_-]+".join(map(re.escape, term.lower().split()))
    assert re.search(rf"(?<![a-z]){words}s?(?![a-z])", code())
