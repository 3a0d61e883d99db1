"""Answers and stream chunks as JSON values of OpenAI's API."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from loader.serving.answers.events import Counts, TokenLogprob
from loader.serving.answers.tool_calls import ToolCall
from loader.serving.answers.vocabulary import Vocabulary


def usage(counts: Counts) -> dict[str, Any]:
    """Return the usage object of one answer."""
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.new,
        "total_tokens": counts.prompt + counts.new,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
    }


def error_json(
    message: str, kind: str, parameter: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error object."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


class ChatJson:
    """Formats a chat answer, whole or in chunks."""

    def __init__(self, model: str, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def first(self) -> dict[str, Any]:
        """Return the chunk before any text."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """Return a chunk with `text`."""
        return self._chunk({"content": text}, logprobs=self._logprobs(logprobs))

    def last(self, reason: str, calls: Sequence[ToolCall] = ()) -> list[dict[str, Any]]:
        """Return the chunks after all text."""
        chunks = [
            self._chunk({"tool_calls": [call.as_dict(index)]}) for index, call in enumerate(calls)
        ]
        return [*chunks, self._chunk({}, "tool_calls" if calls else reason)]

    def counts(self, counts: Counts) -> dict[str, Any]:
        """Return the chunk with the usage object."""
        return {
            **self._common,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage(counts),
        }

    def whole(
        self,
        text: str,
        reason: str,
        counts: Counts,
        logprobs: Sequence[TokenLogprob] | None,
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        """Return the whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [call.as_dict() for call in calls]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": "tool_calls" if calls else reason,
        }
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(counts),
        }

    def _chunk(
        self, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        top = [self._named(other, logprob) for other, logprob in token.top]
        return {**self._named(token.token, token.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._vocabulary.text(token)
        # The bytes of a partial character cannot be read from its text.
        n_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": n_bytes}


class CompletionJson:
    """Formats a completion, whole or in chunks."""

    def __init__(self, model: str, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._common = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def first(self) -> None:
        """Return None: no chunk precedes the text."""
        return None

    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """Return a chunk with `text`."""
        return self._answer(text, None, logprobs)

    def last(self, reason: str, calls: Sequence[ToolCall] = ()) -> list[dict[str, Any]]:
        """Return the chunks after all text."""
        return [self._answer("", reason, None)]

    def counts(self, counts: Counts) -> dict[str, Any]:
        """Return the chunk with the usage object."""
        return {**self._common, "choices": [], "usage": usage(counts)}

    def whole(
        self,
        text: str,
        reason: str,
        counts: Counts,
        logprobs: Sequence[TokenLogprob] | None,
        calls: Sequence[ToolCall] = (),
    ) -> dict[str, Any]:
        """Return the whole answer."""
        return {**self._answer(text, reason, logprobs), "usage": usage(counts)}

    def _answer(
        self, text: str, reason: str | None, logprobs: Sequence[TokenLogprob] | None
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": reason,
        }
        return {**self._common, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        name = self._vocabulary.text
        return {
            "tokens": [name(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {name(other): logprob for other, logprob in token.top} for token in tokens
            ],
            "text_offset": [token.begin for token in tokens],
        }
