"""The parts of a model card: metadata, our part between two marks, and the user's text around it.

The first mark holds hashes of our part, of the metadata that we wrote, and of the text around it.
They tell what somebody edited since:

- Text above or below the marks is the user's and is kept.
- Edited metadata is kept; fields that it lacks are added.
- A card whose part between the marks was edited, or that has text and no marks, is kept whole.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property

from converter.publish.card_metadata import Metadata, dump_metadata, parse_metadata, split_card

BEGIN = "<!-- moe-convert begin {} {} {}: each upload rewrites this part -->"
END = "<!-- moe-convert end: write your own text below this line, or above the first -->"
_MARKED = re.compile(
    r"^<!-- moe-convert begin ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8}):[^\n]*-->\n(.*?)^"
    + re.escape(END)
    + r"[ \t]*(?:\n|\Z)",
    re.DOTALL | re.MULTILINE,
)
_OLD_MARK = "<!-- made by moe-convert: without this line the card is kept as it is -->"
"""Line of a card by an earlier release, whose whole text was ours."""


@dataclass(frozen=True)
class Hashes:
    """Hashes of what we wrote: our part, our metadata, the user's text around the part."""

    part: str = ""
    metadata: str = ""
    text: str = ""


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
        text = text.replace("\r\n", "\n")
        block, body = split_card(text)
        metadata = parse_metadata(block)
        match = _MARKED.search(body)
        if match is None:
            return cls(text, metadata, body)
        around = body[: match.start()], body[match.end() :]
        return cls(text, metadata, around[0], match[4], around[1], Hashes(*match.groups()[:3]))

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

    @property
    def is_edited_since(self) -> bool:
        """True if the card has other text than when it was written."""
        return self.is_kept_whole or _hash(self.above + self.below) != self.written.text

    def renewed(self, metadata: Metadata, part: str, stated: Metadata | None = None) -> str:
        """Return the card with a new part and new metadata, and with everything of the user.

        stated: fields that replace the user's; None removes one.
        """
        if self.is_kept_whole:
            return self.text
        own = self.metadata if self.has_own_metadata else {}
        around = (self.above, self.below) if self.has_own_text else ("\n", "")
        # The hash is that of our metadata: the next upload must see the user's as edited, too.
        hashes = Hashes(_hash(part), _metadata_hash(metadata), _hash("".join(around)))
        begin = BEGIN.format(hashes.part, hashes.metadata, hashes.text)
        fields = {**metadata, **own, **(stated or {})}
        head = dump_metadata({name: value for name, value in fields.items() if value is not None})
        return f"{head}{around[0]}{begin}\n{part}{END}\n{around[1]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def _metadata_hash(metadata: Metadata) -> str:
    # default: YAML has dates, which JSON has not.
    return _hash(json.dumps(metadata, sort_keys=True, default=str))
