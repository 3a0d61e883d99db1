"""Rules for test files: no private attributes of product objects, no sleeps, rooms for helpers."""

import ast
import re
from pathlib import Path

import pytest
from project_paths import ROOT, SEARCH_PATH, SUPPORT

FILES = sorted((ROOT / "tests").rglob("test_*.py"))
# Attributes of other libraries that have no public name.
FOREIGN = {
    "_attn_implementation",
    "_experts_implementation",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_is_hf_initialized",
    "_model_mapping",
    "_no_split_modules",
    "_ntuple_diskusage",
    "_update_model_kwargs_for_generation",
}
# Two tests set an attribute: a cache on another device, a flag of slow_reader.py.
ASSIGNED = {"layer.mlp.experts._cache", "reader._held"}


def violations(text: str) -> list[str]:
    """Return each access to a private attribute and each sleep as `line: code`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            code = ast.unparse(node)
            on_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_private = re.match("_[^_]", node.attr) and node.attr not in FOREIGN
            is_assigned = isinstance(node.ctx, ast.Store) and code in ASSIGNED
            if code == "time.sleep" or (is_private and not on_itself and not is_assigned):
                found.append(f"{node.lineno}: {code}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_test_uses_what_is_public_and_does_not_sleep(path: Path) -> None:
    assert violations(path.read_text()) == []


def test_a_private_attribute_and_a_sleep_are_reported() -> None:
    assert violations("cache._layers\nself._x\ntime.sleep(1)\ncache.__class__") == [
        "1: cache._layers",
        "3: time.sleep",
    ]


def test_pytest_finds_every_room_of_the_helpers_and_their_names_differ() -> None:
    helpers = sorted(SUPPORT.rglob("*.py"))
    assert {str(path.parent) for path in helpers} <= set(SEARCH_PATH)
    assert len({path.name for path in helpers}) == len(helpers)
