"""stderr: lines of ours, and a context that drops what libraries write."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO


class _ErrorStream:
    """The process's stderr. `own`: a duplicate of it while libraries are muted, else None."""

    own: TextIO | None = None


_STREAM = _ErrorStream()


def notes_stream() -> TextIO:
    """Return the stream for notes, log lines and progress."""
    return _STREAM.own or sys.stderr


def write_line(text: str) -> None:
    """Write a line to stderr, above the bar if there is one."""
    stream = notes_stream()
    if tqdm := sys.modules.get("tqdm"):
        # huggingface_hub draws its downloads by tqdm, which must clear its bars first.
        tqdm.tqdm.write(text, file=stream)
        stream.flush()
    else:
        # Not by click.echo: it may write past the object that rich puts in place of sys.stderr.
        print(text, file=stream, flush=True)


@contextmanager
def libraries_muted(*loggers: str) -> Iterator[None]:
    """Drop what libraries and their child processes write to stderr; `notes_stream` still writes.

    loggers: names of loggers whose warnings are dropped too.

    lm-eval and datasets have no one option that turns off their bars, warnings and git's messages.
    """
    sys.stderr.flush()
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    own = os.fdopen(os.dup(2), "w", encoding=encoding, errors="backslashreplace")
    with own, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        _STREAM.own = own
        levels = {name: logging.getLogger(name).level for name in loggers}
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with redirect_stderr(nowhere):
                yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            _STREAM.own = None
            own.flush()
            os.dup2(own.fileno(), 2)
