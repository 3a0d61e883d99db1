"""The licence that a folder's model card states."""

import re
from pathlib import Path

from formats.files.paths import read_small

_CARD_NAME = "README.md"
_FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_LICENSE = re.compile(r"""^license: *["']?([\w.+-]+)["']?$""", re.MULTILINE | re.ASCII)


def card_license(folder: Path) -> str | None:
    """Return the licence's Hub id in the card's metadata; None if the card names none."""
    if not (folder / _CARD_NAME).is_file():
        return None
    card = read_small(folder, _CARD_NAME, str(folder)).decode(errors="replace")
    metadata = _FRONT_MATTER.match(card)
    found = _LICENSE.search(metadata[1]) if metadata else None
    return found[1] if found else None
