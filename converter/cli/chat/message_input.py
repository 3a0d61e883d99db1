"""Messages from stdin: lines with editing and history at a terminal, plain lines from a pipe."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from formats.errors import MoeConvertError

_log = logging.getLogger(__name__)

PROMPT = "> "
MORE_PROMPT = ". "
BLOCK = '"""'
HISTORY_MESSAGES = 1000


class Lines(Protocol):
    """Where lines come from. is_terminal: somebody types them, and can be asked."""

    is_terminal: bool

    def read(self, prompt: str) -> str:
        """Return the next line without its end. EOFError behind the last one."""

    def remember(self, message: str) -> None:
        """Put a message into the history."""


def read_message(lines: Lines) -> str:
    """Return the next message: a line; several, each but the last with a backslash at its end; or a
    block between two triple quotes. A block also ends where the input does. EOFError behind the
    last message.
    """
    first = lines.read(PROMPT)
    if first.lstrip().startswith(BLOCK):
        text = _read_block(lines, first.lstrip().removeprefix(BLOCK))
    else:
        text = _read_continued(lines, first)
    with _decoding():
        text.encode()
    if text.strip():
        lines.remember(text)
    return text


def _read_block(lines: Lines, first: str) -> str:
    parts = [first]
    with contextlib.suppress(EOFError):
        while not parts[-1].rstrip().endswith(BLOCK):
            parts.append(lines.read(MORE_PROMPT))
    return "\n".join(parts).rstrip().removesuffix(BLOCK).strip("\n")


def _read_continued(lines: Lines, first: str) -> str:
    parts = [first]
    with contextlib.suppress(EOFError):
        while parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
            parts.append(lines.read(MORE_PROMPT))
    return "\n".join(parts)


class PipedLines:
    """Lines of a file or a pipe."""

    is_terminal = False

    def read(self, prompt: str) -> str:
        with _decoding():
            line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def remember(self, message: str) -> None:
        pass


class TypedLines:
    """Lines that somebody types, with readline where this Python has it.

    history: a file of earlier messages, read at the beginning. completions: words that the tab key
    completes.
    """

    is_terminal = True

    def __init__(self, history: Path, completions: Sequence[str]) -> None:
        self._history = history
        self._readline = _readline()
        if self._readline is not None:
            _set_up(self._readline, completions)
            # No file yet, or one of another program's.
            with contextlib.suppress(OSError, UnicodeError):
                self._readline.read_history_file(os.fspath(history))

    def read(self, prompt: str) -> str:
        with _decoding():
            if sys.stdout.isatty():
                return input(prompt)
            # The answers go into a file; Python would write the prompt there too.
            sys.stderr.write(prompt)
            sys.stderr.flush()
            return input()

    def remember(self, message: str) -> None:
        if self._readline is not None:
            self._readline.add_history(message)

    def save(self) -> None:
        """Write the history, readable for its owner only. Where that fails, a log line says why."""
        if self._readline is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
            self._readline.set_history_length(HISTORY_MESSAGES)
            self._readline.write_history_file(os.fspath(self._history))
        except OSError as e:
            _log.warning("the history of messages is not kept: %s: %s", self._history, e.strerror)


def history_path() -> Path:
    """Return the file of earlier messages, in the user's folder for state."""
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder) / "moe-convert" / "chat_history"


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """MoeConvertError for bytes that are no text."""
    try:
        yield
    except UnicodeError:
        raise MoeConvertError(
            "the message is not UTF-8", "give it in UTF-8, or set the locale"
        ) from None


def _readline() -> Any:
    try:
        import readline
    except ImportError as e:
        _log.warning("lines cannot be edited: this Python has no readline: %s", e)
        return None
    return readline


def _set_up(readline: Any, completions: Sequence[str]) -> None:
    readline.set_auto_history(False)
    readline.set_completer_delims(" ")
    readline.set_completer(_completer(completions, readline.get_line_buffer))
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
        return
    readline.parse_and_bind("tab: complete")
    # Lines that are pasted together are one message.
    readline.parse_and_bind("set enable-bracketed-paste on")


def _completer(words: Sequence[str], line: Callable[[], str]) -> Callable[[str, int], str | None]:
    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if word.startswith(text)] if line() == text else []
        return found[state] if state < len(found) else None

    return complete
