"""The model card of an attacker's index: rendered, it has no link, image or tag from the index, and
one block of metadata.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from bad_folders import VECTORS
from hub_server import HubServer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from msgspec.structs import replace

from converter.publish.card_parts import Card
from converter.publish.hub_commit import PublishOptions, publish_folder
from converter.publish.model_card import CardFacts, card_metadata, card_part
from formats.artifact import Artifact
from formats.index import Index
from formats.quality import Comparison, Evaluation, Quality

MARK = "ATTACK"
LICENSED = CardFacts("me/model", carried={"license": "mit"})
TEXTS = [
    f"# {MARK}",
    f"![{MARK}](https://evil.example/x.png)",
    f"[{MARK}](https://evil.example)",
    f"[{MARK}][1]",
    f"<img src=x onerror=alert(1)> {MARK}",
    f"<script>{MARK}</script>",
    f"<https://evil.example/{MARK}>",
    f"https://evil.example/{MARK}",
    f"{MARK}@evil.example",
    f"`</code><b>{MARK}</b>`",
    f"`` {MARK} ``` <b>",
    f"{MARK} | a | b |",
    f"\\| {MARK} \\`<b>",
    f"--- {MARK}",
    f"\n---\nlicense: {MARK}\n---\n<b>",
    f'", "base_model": "{MARK}/x',
    f"{MARK}: [x, y]",
    f"**{MARK}** ~~x~~ &lt;b&gt;",
    f"-->{MARK}<!--",
    f"\u2028# {MARK}",
    " ",
    "",
]


def hostile(text: str) -> tuple[Index, Quality]:
    """An index and a quality.json with `text` in every label that the format leaves free.

    The text may have line breaks, which the format does not allow.
    """
    index = Artifact.open(VECTORS / "folder").index
    index = replace(
        index,
        producer=replace(index.producer, name=text, version=text, versions={text: text, "b": text}),
        source=replace(index.source, name=text, revision=text),
        recipe=replace(
            index.recipe,
            **dict.fromkeys(("name", "attention", "solver", "head"), text),
            options={"calibrate": "file", "calibration_tokens": text},
        ),
    )
    row = Comparison(text, 4, 1000, 61.9, 61.0, 1.0147, 0.001, 0.0123, 0.001, 0.95, [0.9])
    return index, Quality(
        text,
        {"experts": 0.1, text: 1.0},
        [],
        {text: 0.1},
        [],
        Evaluation(text, 256, {}, [row], row),
    )


def card_text(index: Index, quality: Quality, facts: CardFacts) -> str:
    """Return the card of a folder with this index."""
    artifact = Artifact(VECTORS / "folder", index, index.config)
    return Card("", {}).renewed(card_metadata(index, facts), card_part(artifact, quality, facts))


def tokens_of(card: str) -> Iterator[Token]:
    """All tokens of the rendered card, without its metadata."""
    body = card.split("---\n", 2)[2]
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body):
        yield token
        yield from token.children or []


def shape(card: str) -> list[str]:
    return [token.type for token in tokens_of(card)]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_an_index_are_code_in_the_card_and_nothing_else(text: str) -> None:
    card = card_text(*hostile(text), LICENSED)
    for token in tokens_of(card):
        assert token.type not in ("image", "html_inline", "hr"), token
        if token.type == "link_open":
            assert token.attrs["href"] == "#memory"
        if MARK in token.content and token.type != "inline":
            assert token.type in ("code_inline", "fence"), token
        if token.type == "html_block":
            assert re.fullmatch("<!-- moe-convert (begin|end)[^<>]*-->\n?", token.content)
    assert shape(card) == shape(card_text(*hostile("plain"), LICENSED))


@pytest.mark.parametrize("text", TEXTS)
def test_the_metadata_are_the_expected_ones_whatever_an_index_says(text: str) -> None:
    card = card_text(*hostile(text), LICENSED)
    assert len(re.findall(r"^---\s*$", card, re.M)) == 2
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "moe-convert",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["mixtral", "moe", "quantized", "moe-convert"],
    }


def test_the_commit_of_an_upload_is_described_without_markup_of_an_index(
    hub: HubServer, converted_copy: Path
) -> None:
    path = converted_copy / "moe_index.json"
    index = json.loads(path.read_text())
    index["source"]["name"] = "![x](https://evil.example) <b> @me #1 `y` [z][1]"
    path.write_text(json.dumps(index))
    publish_folder(converted_copy, PublishOptions("me/tiny-2bit", license="mit"))
    title = hub.head("me/tiny-2bit").title
    assert re.fullmatch(r"[\w./+ -]*, 2bit, by moe-convert", title), title


def test_only_the_name_of_a_repository_becomes_a_link() -> None:
    index, quality = hostile("plain")
    index = replace(index, source=replace(index.source, name="me/tiny"))
    links = [
        t.attrs["href"]
        for t in tokens_of(card_text(index, quality, CardFacts("a/b")))
        if t.type == "link_open"
    ]
    assert set(links) == {"https://huggingface.co/me/tiny", "#memory"}
    given = card_text(index, quality, CardFacts("a/b", base_model="x](https://evil.example) <b>"))
    assert [t.attrs["href"] for t in tokens_of(given) if t.type == "link_open"] == ["#memory"]
    assert "html_inline" not in shape(given)
