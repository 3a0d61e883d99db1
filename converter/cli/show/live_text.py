"""Streams an answer to stdout; a status line below it if stdout and stderr are one terminal."""

import shutil
import sys
import unicodedata
from collections.abc import Callable

from converter.cli.show.terminal import printable

_MARGIN = 2
"""Columns at the right edge with no status line. A terminal delays the wrap there and forgets it
when the cursor moves; the next character would overwrite the last one.
"""
_TAB = 8


class LiveText:
    """Writes pieces of text to stdout. status: returns the status line; None for no line."""

    def __init__(self, status: Callable[[], str] | None = None) -> None:
        is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._status = status if is_terminal else None
        self._cursor = Cursor()
        self._is_drawn = False

    def __call__(self, piece: str) -> None:
        """Write `piece` and redraw the status line."""
        self.clear()
        # Token texts come from an untrusted file.
        text = printable(piece)
        sys.stdout.write(text)
        sys.stdout.flush()
        if self._status is None:
            return
        columns = shutil.get_terminal_size().columns
        self._cursor.write(text, columns)
        if self._cursor.is_inside(columns):
            self._draw(self._status()[: columns - 1])

    def clear(self) -> None:
        """Erase the status line."""
        if self._is_drawn:
            # Erase from the cursor to the end of the screen.
            self._write("\x1b[J")
        self._is_drawn = False

    def end(self) -> None:
        """Erase the status line and end the text with a line feed."""
        self.clear()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _draw(self, line: str) -> None:
        # Down and up first: on the last row this scrolls before the position is saved.
        self._write(f"\x1bD\x1b[A\x1b7\x1b[B\r{line}\x1b8")
        self._is_drawn = True

    def _write(self, codes: str) -> None:
        sys.stderr.write(codes)
        sys.stderr.flush()


class Cursor:
    """Cursor column after a text; unknown after a character whose width differs by terminal."""

    def __init__(self) -> None:
        self._column = 0
        self._columns = 0
        self._is_known = True

    def write(self, text: str, columns: int) -> None:
        """Advance by `text` on a terminal with `columns` columns."""
        for character in text:
            if character in "\r\n":
                self._column = 0
                self._is_known = True
            elif character == "\t":
                self._column = min((self._column // _TAB + 1) * _TAB, columns - 1)
            else:
                self._advance(_width(character), columns)
        if columns != self._columns and self._column:
            # After a resize the terminal may have wrapped the line again.
            self._is_known = self._is_known and not self._columns
        self._columns = columns

    def is_inside(self, columns: int) -> bool:
        """True if the cursor is known to be left of the right edge."""
        return self._is_known and self._column < columns - _MARGIN

    def _advance(self, width: int | None, columns: int) -> None:
        if width is None:
            self._is_known = False
        elif self._column + width > columns:
            self._column = width
        else:
            self._column += width


def _width(character: str) -> int | None:
    """Return the columns of a printable character; None for emoji and combining characters, where
    terminals differ.
    """
    if character.isascii():
        return 1
    if unicodedata.category(character) in ("Mn", "Me", "Mc", "Cf", "Sk", "So", "Cn", "Co"):
        return None
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
