"""Markdown of a model card: code in a line and code blocks."""

from collections.abc import Iterator

from formats.labels import to_label

_ENDS_OF_CODE = str.maketrans({"`": "'", "|": "¦"})


def code(text: str) -> str:
    """Return `text` as inline code: no link, address, image or tag in it has a meaning.

    A backtick would end the code, and a bar the cell of a table: both are replaced.
    """
    return f"`{to_label(text).translate(_ENDS_OF_CODE) or ' '}`"


def block(language: str, *lines: str) -> Iterator[str]:
    """Yield a code block. No line may begin with a backtick, which could end it."""
    yield f"```{language}"
    yield from lines
    yield "```"
