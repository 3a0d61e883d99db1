"""docs/security.md: the files that may reach transformers, the limits, and the tests it names."""

import re

import pytest
from project_paths import ROOT

from formats import TRUNK_NAME
from formats.config.side_files import MAX_BYTES, MAX_FILES, OPTIONAL, READ_BY_TRANSFORMERS
from formats.hub.repo_files import MAX_SMALL_BYTES
from formats.hub.revision_files import MAX_FILES as MAX_LISTED
from formats.safetensors_header import max_header_bytes

PAGE = (ROOT / "docs/security.md").read_text()
PROOFS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def rows(title: str) -> list[tuple[str, str]]:
    """The first two cells of the table's rows in a section."""
    section = next(s for s in re.split(r"^## ", PAGE, flags=re.M) if s.startswith(f"{title}\n"))
    return re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, flags=re.M)


def test_the_page_lists_the_files() -> None:
    listed = {
        name.strip("`"): reader for name, reader in rows("Names of files") if name.startswith("`")
    }
    for_transformers = {
        name for name, reader in listed.items() if reader.startswith("transformers")
    }
    assert for_transformers == {TRUNK_NAME, *READ_BY_TRANSFORMERS}
    assert listed.keys() - for_transformers == set(OPTIONAL)


def test_the_page_has_the_limits() -> None:
    limits = dict(rows("What we promise"))
    assert (MAX_SMALL_BYTES, MAX_BYTES, MAX_FILES, MAX_LISTED) == (
        16 << 20,
        256 << 20,
        1000,
        20_000,
    )
    assert limits["files in a repository"] == "20,000"
    assert limits["tokenizer files, chat templates, licences"].startswith(
        "256 MiB each, 1,000 files"
    )
    assert max_header_bytes(7) == (64 << 10) + 7 * 1024
    assert limits["header of trunk or layer file"] == "64 KiB and 1 KiB for each tensor"


@pytest.mark.parametrize(("file", "test"), PROOFS)
def test_the_page_names_tests_that_exist(file: str, test: str) -> None:
    assert f"\ndef {test}(" in (ROOT / file).read_text()


def test_the_page_has_a_proof_of_each_attack() -> None:
    attacks = rows("Proofs")[1:]
    assert len(attacks) >= 8
    assert [attack for attack, proofs in attacks if "::" not in proofs] == []
