"""The answers on the chat page: a server's stream as messages of gradio."""

import html
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import gradio as gr

from converter.cli.chat.remote_chat import RemoteChat
from converter.cli.chat.remote_session import RemoteAnswer, request_body
from formats.errors import MoeConvertError, RecipeError
from loader.serving.answers.settings import GenerationSettings
from loader.serving.conversation import ContextFullError
from loader.serving.prompts.chat_template import Message

Number = TypeVar("Number", int, float)
PageMessage = dict[str, Any]
"""A message of gradio's chatbot: role, content (a text or a list of parts), metadata."""


@dataclass(frozen=True)
class PageAnswers:
    """Answers of `remote`. settings: sampling options that the page does not show."""

    remote: RemoteChat
    settings: GenerationSettings

    async def answer(
        self,
        question: str,
        history: list[PageMessage],
        system: str,
        temperature: str,
        max_new_tokens: str,
    ) -> AsyncGenerator[list[PageMessage], None]:
        """Yield the growing answer. Cancelling or closing ends the generation.

        temperature, max_new_tokens: numbers; an empty text leaves it to the server. An error is a
        message of its own: a raised error would hide the conversation.
        """
        answer = RemoteAnswer()
        shown: list[PageMessage] = []
        try:
            settings = replace(self.settings, temperature=_number(temperature, float))
            limit = _number(max_new_tokens, int)
            if limit is not None:
                settings = replace(settings, max_new_tokens=limit)
            messages = messages_of(system, history, question)
            async with aclosing(self._chunks(messages, settings, limit)) as chunks:
                async for chunk in chunks:
                    if answer.add(chunk):
                        shown = [_message(answer.text)]
                        yield shown
        except ContextFullError as e:
            yield [*shown, _error(e.message, "clear the conversation, or shorten the message")]
        except MoeConvertError as e:
            yield [*shown, _error(e.message, e.hint)]
        if answer.finish_reason == "length":
            gr.Info(f"The answer was cut at its maximum length (tokens: {answer.new_tokens}).")

    async def _chunks(
        self, messages: list[Message], settings: GenerationSettings, max_new_tokens: int | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        body = request_body(self.remote.model, messages, settings, max_new_tokens)
        try:
            async with aclosing(self.remote.server.stream_async(body)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        except ContextFullError:
            if max_new_tokens is None:
                raise
        # The answer gets the rest of the context, which is less than max_new_tokens.
        async with aclosing(self._chunks(messages, settings, None)) as chunks:
            async for chunk in chunks:
                yield chunk


def messages_of(system: str, history: list[PageMessage], question: str) -> list[Message]:
    """Return the messages of a request. Errors and questions without an answer are left out:
    templates expect questions and answers in turn.
    """
    messages = [{"role": "system", "content": system}] if system else []
    turns = [
        {"role": message["role"], "content": _text_of(message["content"])}
        for message in history
        if not (message.get("metadata") or {}).get("title")
    ]
    for asked, answered in pairwise(turns):
        if (asked["role"], answered["role"]) == ("user", "assistant") and answered["content"]:
            messages += [asked, answered]
    return [*messages, {"role": "user", "content": question}]


def _number(text: str, kind: type[Number]) -> Number | None:
    """Return the number in a field of the page; None if the field is empty."""
    try:
        return kind(text) if text.strip() else None
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise RecipeError(f"Settings: {text!r} is not {expected}", "correct the field") from None


def _text_of(content: Any) -> str:
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return "".join(parts)


def _message(text: str) -> PageMessage:
    # A list of parts: gradio strips and dedents a plain text, and the next prompt would differ.
    return {"content": [{"type": "text", "text": text}]}


def _error(message: str, hint: str) -> PageMessage:
    text = html.escape(f"{message}\n\nNext: {hint}" if hint else message, quote=False)
    return {**_message(text), "metadata": {"title": "Error"}}
