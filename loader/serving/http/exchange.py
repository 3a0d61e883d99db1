"""One HTTP request and its answer, whole or as server-sent events. A disconnect cancels it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Receive

from loader.serving.answers.events import End, Event, Failure, Piece, TokenLogprob
from loader.serving.answers.request import Request
from loader.serving.answers.tool_calls import ToolCall, ToolCallText
from loader.serving.engine import Engine
from loader.serving.http.answer_json import ChatJson, CompletionJson, error_json

CLIENT_GONE = 499
"""Status in the metrics for a client that disconnected before its answer."""


class Exchange:
    """A request in the engine, and the format of its answer.

    tools: names of tools that the answer may call; None without tools.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        form: ChatJson | CompletionJson,
        tools: frozenset[str] | None = None,
    ) -> None:
        """Submit the request. Needs a running event loop. Errors as in `Engine.submit`."""
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._form = form
        self._has_logprobs = request.logprobs is not None
        self._tools = tools
        self._calls = ToolCallText()
        self._is_gone = False
        self._job = engine.submit(request, lambda event: _deliver(loop, self._events, event))

    async def cancel_when_gone(self, receive: Receive) -> None:
        """Cancel the job when the client disconnects. The body must have been read before."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._job.cancel()

    def cancel(self) -> None:
        """End the generation within one token, if it still runs."""
        self._job.cancel()

    async def whole(self) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the whole answer."""
        text = ""
        logprobs: list[TokenLogprob] = []
        while isinstance(event := await self._events.get(), Piece):
            text += self._shown(event.text)
            logprobs += event.logprobs
        if isinstance(event, Failure):
            # Nobody reads this answer. Its status only appears in the metrics.
            return (CLIENT_GONE, {}) if self._is_gone else _failure(event)
        rest, calls = self._rest()
        reported = logprobs if self._has_logprobs else None
        return 200, self._form.whole(text + rest, event.reason, event.counts, reported, calls)

    async def stream(self, *, includes_usage: bool) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        if first := self._form.first():
            yield _line(first)
        while isinstance(event := await self._events.get(), Piece):
            if chunk := self._chunk(self._shown(event.text), event.logprobs):
                yield _line(chunk)
                # With several events waiting, the event loop needs a turn to notice a disconnect.
                await asyncio.sleep(0)
        if isinstance(event, Failure):
            yield _line(_failure(event)[1])
            return
        for chunk in self._end(event, includes_usage=includes_usage):
            yield _line(chunk)
        yield "data: [DONE]\n\n"

    def _chunk(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        return (
            self._form.piece(text, logprobs if self._has_logprobs else None)
            if text or logprobs
            else None
        )

    def _end(self, event: End, *, includes_usage: bool) -> list[dict[str, Any]]:
        rest, calls = self._rest()
        chunks = [self._form.piece(rest, None)] if rest else []
        chunks += self._form.last(event.reason, calls)
        return [*chunks, self._form.counts(event.counts)] if includes_usage else chunks

    def _shown(self, text: str) -> str:
        return text if self._tools is None else self._calls.push(text)

    def _rest(self) -> tuple[str, list[ToolCall]]:
        return ("", []) if self._tools is None else self._calls.end(self._tools)


def _deliver(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]", event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


def _failure(event: Failure) -> tuple[int, dict[str, Any]]:
    if event.cancelled:
        return 503, error_json(
            "the generation was cancelled: the server is shutting down", "server_error"
        )
    return 500, error_json(f"the generation failed: {event.error}", "server_error")


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
