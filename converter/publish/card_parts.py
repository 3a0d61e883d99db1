"""The parts of a model card: metadata, our part between two marks, and the user's text around it.

The first mark holds hashes of what the last upload wrote. They tell what somebody edited since:

- Text above or below the marks is the user's and is kept.
- Edited metadata is kept; fields that it lacks are added.
- A card whose part between the marks was edited, or that has text and no marks, is kept whole.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property

from converter.publish.card_metadata import Metadata, dump_metadata, parse_metadata, split_card

BEGIN = "<!-- moe-convert begin {} {} {} {}: each upload rewrites this part -->"
END = "<!-- moe-convert end: write your own text below this line, or above the first -->"
_MARKED = re.compile(
    r"^<!-- moe-convert begin ((?:[0-9a-f]{8} ?)+):[^\n]*-->\n(.*?)^"
    r"<!-- moe-convert end[^\n]*-->[ \t]*(?:\n|\Z)",
    re.DOTALL | re.MULTILINE,
)
_OLD_MARK = "<!-- made by moe-convert: without this line the card is kept as it is -->"
"""Line of a card by an earlier release, whose whole text was ours."""


@dataclass(frozen=True)
class Hashes:
    """Hashes of a card that we wrote.

    part, metadata: ours. text, all_metadata: the user's text around the part, and the metadata with
    the user's fields.
    """

    part: str = ""
    metadata: str = ""
    text: str = ""
    all_metadata: str = ""


@dataclass(frozen=True)
class Card:
    """A parsed README.md.

    text: the whole card. part: our part; None without marks. above, below: the user's text around
    it, the line breaks included. written: None without marks.
    """

    text: str
    metadata: Metadata
    above: str = "\n"
    part: str | None = None
    below: str = ""
    written: Hashes = Hashes()

    @classmethod
    def parse(cls, text: str) -> "Card":
        """Parse a card. Raises ValueError for metadata that cannot be read."""
        block, body = split_card(text.replace("\r\n", "\n"))
        metadata = parse_metadata(block)
        match = _MARKED.search(body)
        if match is None:
            return cls(text, metadata, body)
        around = body[: match.start()], body[match.end() :]
        return cls(text, metadata, around[0], match[2], around[1], Hashes(*match[1].split()[:4]))

    @cached_property
    def is_old(self) -> bool:
        """True for a card by an earlier release: it has no text of the user."""
        return self.part is None and _OLD_MARK in self.text

    @cached_property
    def is_kept_whole(self) -> bool:
        """True if the user wrote the card, or edited our part of it."""
        if self.part is None:
            return not self.is_old and bool(self.above.strip())
        return _hash(self.part) != self.written.part

    @cached_property
    def has_own_metadata(self) -> bool:
        """True if somebody edited the metadata."""
        is_ours = self.is_old or not self.metadata
        return not is_ours and _metadata_hash(self.metadata) != self.written.metadata

    @cached_property
    def has_own_text(self) -> bool:
        """True if there is text of the user around our part."""
        return self.part is not None and bool(self.above.strip() or self.below.strip())

    @property
    def is_edited(self) -> bool:
        """True if anything of the card is the user's."""
        return self.is_kept_whole or self.has_own_text or self.has_own_metadata

    def conflicts_with(self, published: "Card") -> bool:
        """True if both cards have edits that the other lacks.

        published: the card that an upload wrote and that may have been edited after it.
        """
        if published.written in (self.written, Hashes()) or published.text == self.text:
            # The folder's card is a later copy, or none was uploaded yet.
            return False
        text_since = _hash(published.above + published.below) != published.written.text
        metadata_since = _metadata_hash(published.metadata) != published.written.all_metadata
        return (
            (published.is_kept_whole and self.is_edited)
            or (text_since and self.has_own_text)
            or (metadata_since and self.has_own_metadata)
        )

    def merged_with(self, published: "Card") -> "Card":
        """Return the card with the edits of both; where both have some, with its own."""
        if self.is_kept_whole or (published.is_kept_whole and not self.is_edited):
            return self if self.is_kept_whole else published
        text = self if self.has_own_text else published
        fields = self if self.has_own_metadata else published
        written = replace(text.written, metadata=fields.written.metadata)
        return replace(text, metadata=fields.metadata, written=written)

    def renewed(self, metadata: Metadata, part: str, stated: Metadata | None = None) -> str:
        """Return the card with a new part and new metadata, and with everything of the user.

        stated: fields that replace the user's; None removes one.
        """
        if self.is_kept_whole:
            return self.text
        own = self.metadata if self.has_own_metadata else {}
        around = (self.above, self.below) if self.has_own_text else ("\n", "")
        fields = {**metadata, **own, **(stated or {})}
        fields = {name: value for name, value in fields.items() if value is not None}
        begin = BEGIN.format(
            _hash(part), _metadata_hash(metadata), _hash("".join(around)), _metadata_hash(fields)
        )
        head = dump_metadata(fields)
        return f"{head}{around[0]}{begin}\n{part}{END}\n{around[1]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def _metadata_hash(metadata: Metadata) -> str:
    # default: YAML has dates, which JSON has not.
    return _hash(json.dumps(metadata, sort_keys=True, default=str))
