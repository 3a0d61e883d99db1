"""Only the files named here know a model type by its names; all others ask transformers."""

import re
from pathlib import Path

from project_paths import ROOT

WORDS = re.compile(r"\bw1\b|block_sparse_moe|mixtral", re.IGNORECASE)
# Folders and repositories in examples, and the example model.
NAMES = re.compile(r"my-mixtral(-2bit)?|mixtral-2bit|Mixtral-8x7B[\w.-]*|tiny-mixtral")

EXEMPT = {
    "formats/config/model_types.py": "the list of tested model types",
    "converter/checkpoint/foreign_layouts.py": "names that other programs write",
    "converter/gguf/hyperparameters.py": "the architecture of an exported file",
    "loader/decode/mixtral.py": "a spec of the decoder",
    "loader/decode/specs.py": "the table of specs",
}


def lines_with_words(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if WORDS.search(NAMES.sub("", line))]


def test_family_words_stand_in_exempt_files_alone() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for package in ("converter", "formats", "loader")
        for path in (ROOT / package).rglob("*.py")
        if (lines := lines_with_words(path))
    }
    assert {name: lines for name, lines in found.items() if name not in EXEMPT} == {}
    assert sorted(EXEMPT.keys() - found.keys()) == [], "no longer needs its exemption"
