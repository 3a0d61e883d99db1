"""The text of an answer, token by token: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from typing import Any

MOST_WAITING = 16
"""Tokens that wait for a whole character; one takes at most four bytes, so more are no text in
UTF-8.
"""
_UNFINISHED = "�"


class TextStream:
    """Turns tokens into pieces of text. Together the pieces are what the tokenizer makes of all
    tokens, cut before the first of the strings `stop`.

    before: tokens that the answer goes on after, which decide whether it begins with a space.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(before)
        # Tokens before `_shown` are in the text; those from `_begin` on are decoded again with what
        # follows, since a token's text depends on its neighbours.
        self._begin = 0
        self._shown = len(self._ids)
        self._held = ""
        self.text = ""
        """All pieces until now."""
        self.stopped = False
        """True once a stop string has come."""

    @property
    def length(self) -> int:
        """Characters so far, those that are held back included."""
        return len(self.text) + len(self._held)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, which may be empty."""
        self._ids.append(token)
        return self._released(self._decoded(last=False))

    def finish(self) -> str:
        """Return what was held back. Once, after the last token."""
        piece = self._released(self._decoded(last=True))
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _decoded(self, *, last: bool) -> str:
        before = self._decode(self._ids[self._begin : self._shown])
        whole = self._decode(self._ids[self._begin :])
        waits = whole.endswith(_UNFINISHED) or len(whole) <= len(before)
        if waits and not last and len(self._ids) - self._shown < MOST_WAITING:
            return ""
        self._begin = self._shown
        self._shown = len(self._ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _released(self, piece: str) -> str:
        """Hold back the end of the text that may begin a stop string; return what comes before it."""
        if self.stopped:
            return ""
        waiting = self._held + piece
        ends = [at for at in (waiting.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            released, self._held = waiting[: min(ends)], ""
        else:
            begins = len(waiting) - max((_overlap(waiting, stop) for stop in self._stop), default=0)
            released, self._held = waiting[:begins], waiting[begins:]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
