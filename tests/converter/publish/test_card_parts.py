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


LOCAL = Card.parse(CARD)
PUBLISHED = Card.parse(Card.parse(CARD).renewed(NEW, "\n# new\n\n"))


def with_text(card: Card, text: str) -> Card:
    return Card.parse(f"{card.text}\n{text}")


def with_field(card: Card, field: str) -> Card:
    return Card.parse(card.text.replace("tags:", f"{field}\ntags:"))


def test_edits_of_both_cards_are_merged() -> None:
    local, published = with_text(LOCAL, "here"), with_field(PUBLISHED, "mine: there")
    assert not local.conflicts_with(published)
    card = Card.parse(local.merged_with(published).renewed(NEW, ""))
    assert (card.below, card.metadata) == ("\nhere", {**NEW, "mine": "there"})
    local, published = with_field(LOCAL, "mine: here"), with_text(PUBLISHED, "there")
    assert not local.conflicts_with(published)
    card = Card.parse(local.merged_with(published).renewed(NEW, ""))
    assert (card.below, card.metadata["mine"]) == ("\nthere", "here")


def test_edit_of_the_same_part_in_both_cards_is_a_conflict() -> None:
    assert with_text(LOCAL, "here").conflicts_with(with_text(PUBLISHED, "there"))
    assert with_field(LOCAL, "mine: here").conflicts_with(with_field(PUBLISHED, "mine: there"))
    whole = Card.parse(PUBLISHED.text.replace("# new", "# there"))
    assert with_text(LOCAL, "here").conflicts_with(whole)
    assert not LOCAL.conflicts_with(whole)
    assert LOCAL.merged_with(whole).text == whole.text


def test_own_edits_that_were_published_before_are_no_conflict() -> None:
    local = with_field(with_text(LOCAL, "first"), "mine: first")
    published = Card.parse(local.renewed(NEW, "\n# new\n\n"))
    assert published.has_own_text
    assert published.has_own_metadata
    local = Card.parse(local.text.replace("first", "second"))
    assert not local.conflicts_with(published)
    card = Card.parse(local.merged_with(published).renewed(NEW, ""))
    assert (card.below, card.metadata["mine"]) == ("\nsecond", "second")


def test_copy_of_the_published_card_wins() -> None:
    published = with_text(PUBLISHED, "there")
    local = with_text(published, "and here")
    assert not local.conflicts_with(published)
    assert local.merged_with(published).below == "\nthere\nand here"


def test_card_that_is_kept_keeps_its_line_breaks() -> None:
    assert Card.parse("# mine\r\n").renewed(NEW, "") == "# mine\r\n"
