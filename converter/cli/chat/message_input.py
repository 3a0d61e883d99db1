"""Reads messages from stdin: with line editing and history at a terminal, plainly from a pipe."""

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
    """A source of lines. is_terminal: a user types them and can be asked questions."""

    is_terminal: bool

    def read(self, prompt: str) -> str:
        """Return the next line without its line feed. EOFError at the end of the input."""

    def remember(self, message: str) -> None:
        """Add a message to the history."""


def read_message(lines: Lines) -> str:
    """Return the next message. EOFError at the end of the input.

    A message is one line; or several lines, each but the last ending with a backslash; or a block
    between two triple quotes. The end of the input also ends a block.
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
    """Lines from a file or a pipe."""

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
    """Lines typed at a terminal, with readline if this Python has it.

    history: file of earlier messages, read at the start. completions: words that Tab completes.
    """

    is_terminal = True

    def __init__(self, history: Path, completions: Sequence[str]) -> None:
        self._history = history
        self._readline = _readline()
        if self._readline is not None:
            _set_up(self._readline, completions)
            # The file may not exist yet, or may not be a history.
            with contextlib.suppress(OSError, UnicodeError):
                self._readline.read_history_file(os.fspath(history))

    def read(self, prompt: str) -> str:
        with _decoding():
            if sys.stdout.isatty():
                return input(prompt)
            # stdout is a file, and input() would write the prompt into it.
            sys.stderr.write(prompt)
            sys.stderr.flush()
            return input()

    def remember(self, message: str) -> None:
        if self._readline is not None:
            self._readline.add_history(message)

    def save(self) -> None:
        """Write the history with mode 600. A failure is only logged."""
        if self._readline is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
            self._readline.set_history_length(HISTORY_MESSAGES)
            self._readline.write_history_file(os.fspath(self._history))
        except OSError as e:
            _log.warning("the message history cannot be saved: %s: %s", self._history, e.strerror)


def history_path() -> Path:
    """Return the history file in the user's XDG state folder."""
    folder = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder) / "moe-convert" / "chat_history"


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Raise MoeConvertError for bytes that are not UTF-8."""
    try:
        yield
    except UnicodeError:
        raise MoeConvertError(
            "the message is not UTF-8", "encode the input as UTF-8, or set a UTF-8 locale"
        ) from None


def _readline() -> Any:
    try:
        import readline
    except ImportError as e:
        _log.warning("no line editing: this Python has no readline: %s", e)
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
    # Lines pasted together become one message.
    readline.parse_and_bind("set enable-bracketed-paste on")


def _completer(words: Sequence[str], line: Callable[[], str]) -> Callable[[str, int], str | None]:
    def complete(text: str, state: int) -> str | None:
        matches = [word for word in words if word.startswith(text)] if line() == text else []
        return matches[state] if state < len(matches) else None

    return complete
