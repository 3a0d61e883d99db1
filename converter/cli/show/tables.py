"""Tables and texts that fit the terminal."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

_GAP = "  "
_NARROWEST = 20
"""Columns of a wrapped cell; a narrower terminal gets longer lines."""


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows as aligned columns: the first `left` to the left, the others to the right.

    A table that is wider than the terminal is folded: columns that do not fit stand in further
    tables below, each with the left columns. If there are only left columns, the last is wrapped.
    """
    columns = terminal_columns()
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if columns is None or sum(widths) + len(_GAP) * (len(widths) - 1) <= columns:
        return _lines(rows, range(len(widths)), widths, left)
    if left >= len(widths):
        return _with_wrapped_cell(rows, widths, columns)
    parts = _parts(widths, left, columns)
    return "\n\n".join(_lines(rows, [*range(left), *part], widths, left) for part in parts)


def folded(text: str) -> str:
    """Return `text` with its long sentences wrapped to the terminal; table rows stay."""
    columns = terminal_columns()
    if columns is None:
        return text
    return "\n".join(
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
        if len(line) > columns and _GAP not in line.strip()
        else line
        for line in text.split("\n")
    )


def terminal_columns() -> int | None:
    """Return the terminal's width; None if stdout and stderr are files or pipes."""
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        return None
    return shutil.get_terminal_size().columns


def _lines(
    rows: Sequence[Sequence[str]], columns: Sequence[int], widths: Sequence[int], left: int
) -> str:
    def cell(text: str, i: int) -> str:
        return text.ljust(widths[i]) if i < left else text.rjust(widths[i])

    return "\n".join(_GAP.join(cell(row[i], i) for i in columns).rstrip() for row in rows)


def _parts(widths: Sequence[int], left: int, columns: int) -> Iterator[list[int]]:
    """Yield the right columns of each folded table."""
    fixed = sum(widths[:left]) + len(_GAP) * left
    part: list[int] = []
    used = fixed
    for i in range(left, len(widths)):
        needed = widths[i] + (len(_GAP) if part else 0)
        if part and used + needed > columns:
            yield part
            part = []
            used = fixed
            needed = widths[i]
        part.append(i)
        used += needed
    yield part


def _with_wrapped_cell(rows: Sequence[Sequence[str]], widths: Sequence[int], columns: int) -> str:
    before = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    width = max(_NARROWEST, columns - before)
    lines = []
    for row in rows:
        start = _GAP.join(text.ljust(w) for text, w in zip(row[:-1], widths, strict=False))
        wrapped = textwrap.wrap(row[-1], width, break_on_hyphens=False) or [""]
        lines.append(f"{start}{_GAP}{wrapped[0]}".rstrip())
        lines += [" " * before + more for more in wrapped[1:]]
    return "\n".join(lines)
