"""Labels: no text of an index, quality.json, trace or journal has control characters; users' names
become labels.
"""

import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_checkpoint import SHAPES, make_checkpoint

from converter.cli.show.terminal import printable
from converter.convert import convert_checkpoint
from converter.journal.records import Record
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.config.strict_json import typed
from formats.errors import FormatError
from formats.index import Index, Label
from formats.labels import MAX_LABEL, has_controls, to_label
from formats.quality import Quality
from loader.traces.record_trace import TracedModel
from loader.traces.trace import TraceHeader

HOSTILE = b"evil\x1b]0;x\x07\n# me \xe2\x80\xae\xff|`"
"""A folder's name: an escape sequence, a line break, a direction override, and a byte that is not
UTF-8.
"""
any_text = st.text(st.characters(exclude_categories=()), max_size=600)


def patterns(kind: Any, place: str, seen: set[Any]) -> Iterator[tuple[str, str | None]]:
    """(place, pattern) of every text in a type, at any depth."""
    kind = msgspec.inspect.type_info(kind) if not isinstance(kind, msgspec.inspect.Type) else kind
    if isinstance(kind, msgspec.inspect.StrType):
        yield place, kind.pattern
    elif isinstance(kind, msgspec.inspect.StructType) and kind.cls not in seen:
        seen.add(kind.cls)
        for field in kind.fields:
            yield from patterns(field.type, f"{place}.{field.name}", seen)
    elif isinstance(kind, msgspec.inspect.UnionType):
        for part in kind.types:
            yield from patterns(part, place, seen)
    elif isinstance(kind, msgspec.inspect.CollectionType):
        yield from patterns(kind.item_type, f"{place}[]", seen)
    elif isinstance(kind, msgspec.inspect.DictType):
        yield from patterns(kind.key_type, f"{place} key", seen)
        yield from patterns(kind.value_type, f"{place}[]", seen)


@pytest.mark.parametrize(
    "kind", [Index, Quality, TraceHeader, *typing.get_args(Record)], ids=lambda kind: kind.__name__
)
def test_every_text_of_a_file_is_a_label_or_a_hash(kind: Any) -> None:
    found = list(patterns(kind, kind.__name__, set()))
    assert found
    assert [place for place, pattern in found if pattern is None] == []


@given(any_text)
def test_any_name_becomes_a_label(name: str) -> None:
    label = to_label(name)
    assert typed(label, Label, "name") == label  # type: ignore[arg-type]
    assert len(label) <= MAX_LABEL


@given(any_text)
def test_what_is_a_label_is_printable_as_it_is_and_keeps(text: str) -> None:
    if len(text) <= MAX_LABEL and not has_controls(text):
        assert typed(text, Label, "text") == text  # type: ignore[arg-type]
        assert to_label(text) == printable(text) == text
    else:
        with pytest.raises(FormatError):
            typed(text, Label, "text")  # type: ignore[arg-type]


def test_a_folder_with_a_hostile_name_is_converted_and_its_name_escaped(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + HOSTILE))
    make_checkpoint(folder, SHAPES["mini"], 1)
    out = tmp_path / "out"
    convert_checkpoint(folder, out, make_recipe("4bit", solver="hqq"))
    name = Artifact.open(out).index.source.name
    assert name == "evil\\x1b]0;x\\x07\\n# me \\u202e\\udcff|`"
    assert "\\x1b" in (out / "README.md").read_text()
    assert TracedModel.of_folder(folder).name == name
