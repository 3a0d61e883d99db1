"""A conversation whose answers a server computes."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from converter.cli.chat.chat_server import ChatServer
from loader.serving.answers.settings import GenerationSettings
from loader.serving.conversation import Conversation, OnText

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


@dataclass
class RemoteAnswer:
    """An answer of a server; implements `ChatAnswer`.

    Token counts are the server's. Without its usage object, each chunk counts as a token.
    """

    text: str = ""
    finish_reason: str = "interrupted"
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float | None = None
    tokens_per_s: float | None = None


class RemoteSession(Conversation):
    """One conversation with `model` of `server`. An interrupt ends the answer but not the session.

    max_new_tokens: maximum length of an answer; None leaves it to the server. Settings that are
    None are not sent.
    """

    def __init__(
        self,
        server: ChatServer,
        model: str,
        settings: GenerationSettings,
        *,
        max_new_tokens: int | None = None,
        system: str = "",
        context_tokens: int | None = None,
    ) -> None:
        super().__init__(settings, system, context_tokens)
        self._server = server
        self._model = model
        self._max_new_tokens = max_new_tokens

    def ask(self, text: str, on_text: OnText) -> RemoteAnswer:
        """Implement `Conversation.ask`. ServerError if the server does not answer."""
        answer = RemoteAnswer()
        begin_s = time.perf_counter()
        try:
            with closing(self._server.stream(self._body(text))) as chunks:
                for piece in _pieces(chunks, answer):
                    if answer.first_token_s is None:
                        answer.first_token_s = time.perf_counter() - begin_s
                    answer.text += piece
                    on_text(piece)
        finally:
            if answer.text:
                _set_speed(answer, time.perf_counter() - begin_s)
                self._add(text, answer)
        return answer

    def turns_to_drop(self, text: str) -> int | None:
        """Return half of the turns: only the server can count their tokens. None without turns."""
        return (len(self._turns) + 1) // 2 or None

    def _body(self, text: str) -> dict[str, Any]:
        settings = {
            name: value for name in _SAMPLING if (value := getattr(self.settings, name)) is not None
        }
        if self._max_new_tokens is not None:
            settings["max_tokens"] = self._max_new_tokens
        return {
            "model": self._model,
            "messages": self._with_question(text),
            "stream": True,
            "stream_options": {"include_usage": True},
            **settings,
        }


def _pieces(chunks: Iterator[dict[str, Any]], answer: RemoteAnswer) -> Iterator[str]:
    """Yield the pieces of text in `chunks`. Record finish reason and token counts in `answer`."""
    for chunk in chunks:
        if usage := chunk.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            answer.prompt_tokens = usage.get("prompt_tokens", 0)
            answer.new_tokens = usage.get("completion_tokens", answer.new_tokens)
            answer.reused_tokens = details.get("cached_tokens", 0) or 0
        for choice in chunk.get("choices") or ():
            if reason := choice.get("finish_reason"):
                answer.finish_reason = reason
            if piece := (choice.get("delta") or {}).get("content"):
                answer.new_tokens += 1
                yield piece


def _set_speed(answer: RemoteAnswer, seconds: float) -> None:
    if answer.first_token_s is not None and answer.new_tokens > 1:
        answer.tokens_per_s = (answer.new_tokens - 1) / max(seconds - answer.first_token_s, 1e-9)
