"""The user's text in a card stays when our part is written anew."""

import pytest

from converter.publish.card_metadata import Metadata
from converter.publish.card_parts import Card

METADATA: Metadata = {"license": "mit", "tags": ["moe"]}
NEW: Metadata = {"license": "apache-2.0", "tags": ["moe"], "base_model": "a/b"}
CARD = Card("", {}).renewed(METADATA, "\n# old\n\n")


def renewed(text: str) -> Card:
    return Card.parse(Card.parse(text).renewed(NEW, "\n# new\n\n"))


def test_card_that_nobody_edited_is_written_anew() -> None:
    card = Card.parse(CARD)
    assert not card.is_edited
    assert (card.part, card.metadata) == ("\n# old\n\n", METADATA)
    assert renewed(CARD).text == Card("", {}).renewed(NEW, "\n# new\n\n")


def test_text_above_and_below_stays() -> None:
    text = CARD.replace("\n<!-- moe-convert begin", "\nmy words\n\n<!-- moe-convert begin")
    card = renewed(f"{text}\nmore words")
    assert (card.above, card.part, card.below) == ("\nmy words\n\n", "\n# new\n\n", "\nmore words")
    assert card.metadata == NEW


@pytest.mark.parametrize("times", [1, 2])
def test_edited_metadata_stay_and_new_fields_are_added(times: int) -> None:
    text = CARD.replace("license: mit", "license: other\nmine: yes")
    for _ in range(times):
        card = renewed(text)
        text = card.text
    assert card.metadata == {**NEW, "license": "other", "mine": True}
    assert card.has_own_metadata


def test_stated_fields_replace_edited_ones() -> None:
    text = CARD.replace("license: mit", "license: other\nlicense_name: x")
    stated = {"license": "mit", "license_name": None}
    card = Card.parse(Card.parse(text).renewed(NEW, "", stated))
    assert card.metadata == {**NEW, "license": "mit"}


def test_order_and_quotes_of_metadata_are_no_edit() -> None:
    text = CARD.replace("license: mit\ntags:\n- moe\n", 'tags: ["moe"]\nlicense: "mit"\n')
    assert text != CARD
    assert not Card.parse(text).is_edited


def test_line_breaks_of_windows_are_no_edit() -> None:
    assert not Card.parse(CARD.replace("\n", "\r\n")).is_edited


@pytest.mark.parametrize(
    "text",
    ["# mine", "---\nlicense: mit\n---\n# mine", CARD.replace("# old", "# mine")],
    ids=["text", "metadata and text", "our part"],
)
def test_card_that_the_user_wrote_is_kept_whole(text: str) -> None:
    card = Card.parse(text)
    assert card.is_kept_whole
    assert card.renewed(NEW, "# new\n") == text


def test_card_of_metadata_alone_gets_our_part() -> None:
    card = renewed("---\nlicense: openrail\n---\n")
    assert card.metadata == {**NEW, "license": "openrail"}
    assert card.part == "\n# new\n\n"


def test_card_by_an_earlier_release_is_written_anew() -> None:
    old = "<!-- made by moe-convert: without this line the card is kept as it is -->"
    assert renewed(f"---\nlicense: mit\n---\n\n{old}\n\n# x\n").text == renewed(CARD).text


def test_change_since_the_upload_is_seen() -> None:
    text = renewed(f"{CARD}\nmine").text
    assert Card.parse(text).is_edited
    assert not Card.parse(text).is_edited_since
    assert Card.parse(f"{text} too").is_edited_since
