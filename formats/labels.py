"""Labels: short texts of strangers' files and users' names, which reach terminals, cards and commit
messages.
"""

import re

CONTROLS = r"\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
"""Inside of a regular expression's brackets: controls (C0, C1), overrides of the direction of text,
and lone surrogates, which stand for bytes of a file name that are not UTF-8 and which no stream
takes.
"""
_FORBIDDEN = CONTROLS + r"\u061c\u200e\u200f\u2028\u2029"
"""In labels also direction marks, which texts may have, and the separators of lines, which are
breaks in YAML.
"""
MAX_LABEL = 512
LABEL_PATTERN = rf"^[^{_FORBIDDEN}]*\Z"

_CONTROL = re.compile(f"[{_FORBIDDEN}]")


def has_controls(text: str) -> bool:
    """True if `text` has a character that no label may have."""
    return _CONTROL.search(text) is not None


def escaped(match: re.Match[str]) -> str:
    """The character of `match` as an escape, such as \\x1b."""
    return match[0].encode("unicode_escape").decode("ascii")


def to_label(text: str) -> str:
    """A user's name as a label: what no label may have is written as an escape, and the rest is cut
    off.
    """
    return _CONTROL.sub(escaped, text)[:MAX_LABEL]
