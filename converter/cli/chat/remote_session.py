"""A conversation whose answers a server computes."""

import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from converter.cli.chat.chat_server import ChatServer
from loader.serving.answers.settings import GenerationSettings
from loader.serving.conversation import Conversation, OnText
from loader.serving.prompts.chat_template import Message

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

    def add(self, chunk: dict[str, Any]) -> str:
        """Add a chunk of the stream and return its text, which may be empty."""
        if usage := chunk.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            self.prompt_tokens = usage.get("prompt_tokens", 0)
            self.new_tokens = usage.get("completion_tokens", self.new_tokens)
            self.reused_tokens = details.get("cached_tokens", 0) or 0
        added = ""
        for choice in chunk.get("choices") or ():
            if reason := choice.get("finish_reason"):
                self.finish_reason = reason
            if piece := (choice.get("delta") or {}).get("content"):
                self.new_tokens += 1
                added += piece
        self.text += added
        return added


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
                for chunk in chunks:
                    if not (piece := answer.add(chunk)):
                        continue
                    if answer.first_token_s is None:
                        answer.first_token_s = time.perf_counter() - begin_s
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
        messages = self._with_question(text)
        return request_body(self._model, messages, self.settings, self._max_new_tokens)


def request_body(
    model: str,
    messages: list[Message],
    settings: GenerationSettings,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """Return the body of a streamed chat completion. Arguments as in `RemoteSession`."""
    sampling = {name: value for name in _SAMPLING if (value := getattr(settings, name)) is not None}
    limit = {} if max_new_tokens is None else {"max_tokens": max_new_tokens}
    return {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
        **limit,
    }


def _set_speed(answer: RemoteAnswer, seconds: float) -> None:
    if answer.first_token_s is not None and answer.new_tokens > 1:
        answer.tokens_per_s = (answer.new_tokens - 1) / max(seconds - answer.first_token_s, 1e-9)
