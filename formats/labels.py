"""Labels: short texts from strangers' files and users' names.

They reach terminals, model cards and commit messages, so they have no control characters.
"""

import re

CONTROLS = r"\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""Part of a regular expression's character class: C0, C1, text direction overrides, surrogates.

Python decodes bytes of a file name that are not UTF-8 to lone surrogates; no stream can encode
them.
"""
_FORBIDDEN = CONTROLS + r"\u061c\u200e\u200f\u2028\u2029"
"""Labels also have no direction marks and no Unicode line separators, which YAML reads as breaks.
"""
MAX_LABEL = 512
"""Length limit of a label, in characters."""
LABEL_PATTERN = rf"^[^{_FORBIDDEN}]*\Z"

_CONTROL = re.compile(f"[{_FORBIDDEN}]")


def has_controls(text: str) -> bool:
    """True if `text` has a character that no label may have."""
    return _CONTROL.search(text) is not None


def escaped(match: re.Match[str]) -> str:
    """Return the matched character as an escape, such as \\x1b."""
    return match[0].encode("unicode_escape").decode("ascii")


def to_label(text: str) -> str:
    """Turn a user's name into a label: escape forbidden characters, cut at `MAX_LABEL`."""
    return _CONTROL.sub(escaped, text)[:MAX_LABEL]
