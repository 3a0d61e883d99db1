"""Escapes control characters of untrusted text before it reaches a terminal."""

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from formats.labels import CONTROLS, escaped

# Escape sequences begin with ESC or a C1 control; bidi overrides reorder what a reader sees.
_CONTROL = re.compile(rf"(?![\t\n])[{CONTROLS}]")


def printable(text: str) -> str:
    """Return `text` with control characters and bidi overrides escaped, but not \\n and \\t."""
    return _CONTROL.sub(escaped, text)


def one_line(text: str) -> str:
    """Return `text` as one printable line: line breaks and runs of spaces become one space."""
    return printable(" ".join(text.split()))


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


@contextlib.contextmanager
def safe_terminal() -> Iterator[None]:
    """Make log records and warnings of all libraries printable, and let stdout and stderr escape
    characters that they cannot encode.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    record_factory = logging.getLogRecordFactory()
    format_warning = warnings.formatwarning

    def formatted(*args: Any, **kwargs: Any) -> str:
        return printable(format_warning(*args, **kwargs))

    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        logging.setLogRecordFactory(record_factory)
        warnings.formatwarning = format_warning
