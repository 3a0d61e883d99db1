"""Turns tokens into text: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from typing import Any

MAX_WAITING_TOKENS = 16
"""Tokens held back for a whole character. A UTF-8 character has at most four bytes: more tokens
than this are invalid UTF-8.
"""
_UNFINISHED = "�"


class TextStream:
    """Turns tokens into pieces of text.

    Joined, the pieces are the decoded text of all tokens, cut before the first stop string.

    before: tokens before the answer; they decide if it begins with a space.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(before)
        # Tokens before `_shown` are in the text. Those from `_begin` on are decoded again with
        # later ones, since a token's text depends on its neighbours.
        self._begin = 0
        self._shown = len(self._ids)
        self._held = ""
        self.text = ""
        """All pieces so far."""
        self.stopped = False
        """True after a stop string."""

    @property
    def length(self) -> int:
        """Number of characters so far, including held-back ones."""
        return len(self.text) + len(self._held)

    def push(self, token: int) -> str:
        """Return the text that `token` completes; it may be empty."""
        self._ids.append(token)
        return self._released(self._decoded(last=False))

    def finish(self) -> str:
        """Return the held-back text. Call it once, after the last token."""
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
        if waits and not last and len(self._ids) - self._shown < MAX_WAITING_TOKENS:
            return ""
        self._begin = self._shown
        self._shown = len(self._ids)
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _released(self, piece: str) -> str:
        """Hold back an end that may begin a stop string. Return the text before it."""
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
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
