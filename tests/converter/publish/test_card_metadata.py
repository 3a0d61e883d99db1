"""Metadata of cards: what is carried over from a stranger's card, and what is not."""

from typing import Any

import pytest
import yaml

from converter.publish.card_metadata import (
    carried_over,
    dump_metadata,
    parse_metadata,
    split_card,
)


def test_fields_that_hold_for_the_converted_model_are_carried_over() -> None:
    card = (
        "---\nlanguage:\n- fr\n- en\nlicense: other\nlicense_name: my-licence\n"
        "license_link: https://example.org/licence\npipeline_tag: text-generation\n"
        "tags:\n- moe\n- vllm\n- my-tag\nlibrary_name: vllm\nbase_model: a/b\n---\n# x\n"
    )
    assert carried_over(parse_metadata(split_card(card)[0])) == {
        "license": "other",
        "license_name": "my-licence",
        "license_link": "https://example.org/licence",
        "language": ["fr", "en"],
        "pipeline_tag": "text-generation",
        "tags": ["moe", "my-tag"],
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"license": "[x](https://evil.example)"},
        {"license": 3},
        {"license": {"a": "b"}},
        {"license_name": "only with a licence"},
        {"license": "mit ", "license_link": "LICENSE"},
        {"language": "<b>"},
        {"language": [False]},
        {"pipeline_tag": "text generation"},
        {"tags": "moe"},
        {"tags": ["<img src=x>", "[a](b)", 1, "x" * 65]},
    ],
    ids=str,
)
def test_value_of_another_form_is_not_carried_over(fields: dict[str, Any]) -> None:
    assert carried_over(fields) == {}


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "https://x)](y", "../../etc/passwd", "a b", 'https://x"y']
)
def test_link_that_is_no_address_is_not_carried_over(link: str) -> None:
    assert carried_over({"license": "mit", "license_link": link}) == {"license": "mit"}


@pytest.mark.parametrize(
    "block",
    [
        "a: [",
        "- a",
        "just text",
        "1: a",
        "a: &x [1]\nb: *x",
        "[" * 100_000,
        "a: !!python/name:os",
    ],
    ids=lambda block: block[:20],
)
def test_metadata_that_cannot_be_read_is_an_error(block: str) -> None:
    with pytest.raises(ValueError, match="its metadata"):
        parse_metadata(block)


def test_card_without_metadata_has_none() -> None:
    assert split_card("# x\n") == (None, "# x\n")
    assert parse_metadata(None) == parse_metadata("") == {}


def test_written_metadata_are_read_back() -> None:
    metadata = {"license": "other", "license_name": "no: 'x' # y", "tags": ["ü", "no", "1.0"]}
    text = dump_metadata(metadata)
    block, rest = split_card(f"{text}\nbody")
    assert (parse_metadata(block), rest) == (metadata, "\nbody")
    assert yaml.safe_load(text.split("---\n")[1]) == metadata
