"""Prompt tokens of requests over HTTP; every field of a message is checked."""

import json
import threading
from typing import Any

from loader.serving.answers.request import RefusedError
from loader.serving.prompts.chat_template import with_one_bos

_ROLES = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "refusal"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
"""Role of a message → its allowed fields."""
_SAME_ROLE = {"developer": "system"}


class Prompts:
    """Makes prompts with one tokenizer. Thread safe. template: None is the tokenizer's."""

    def __init__(self, tokenizer: Any, vocabulary_size: int, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._size = vocabulary_size
        self._template = template or tokenizer.chat_template
        self._lock = threading.Lock()

    @property
    def has_template(self) -> bool:
        """True if a template exists, so that messages are accepted."""
        return bool(self._template)

    def of_messages(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[int, ...]:
        """Return the prompt for the next message of a chat. RefusedError names a wrong field."""
        if not self.has_template:
            raise RefusedError(
                "messages: the model has no chat template; start the server with --template FILE,"
                " or use /v1/completions",
                "messages",
            )
        checked = [
            _message(message, f"messages[{number}]") for number, message in enumerate(messages)
        ]
        text = self._rendered(checked, tools)
        if tools and text == self._rendered(checked, None):
            raise RefusedError("tools: the model's chat template has no place for tools", "tools")
        return self._tokens(text, "messages", special=False)

    def of_text(self, prompt: Any) -> tuple[int, ...]:
        """Return the tokens of a text, a token list, or a list of one of them. RefusedError."""
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            (prompt,) = prompt
        if isinstance(prompt, str):
            return self._tokens(prompt, "prompt", special=True)
        if not all(isinstance(token, int) for token in prompt):
            raise RefusedError("prompt: several prompts in one request are not supported", "prompt")
        return self._checked(prompt, "prompt")

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        try:
            with self._lock:
                rendered = self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=True,
                )
        except Exception as e:
            # A template is foreign code and may raise anything.
            text = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise RefusedError(
                f"messages: the model's chat template rejects them: {text}", "messages"
            ) from e
        return str(rendered)

    def _tokens(self, text: str, where: str, *, special: bool) -> tuple[int, ...]:
        """special: let the tokenizer add BOS; templates write it themselves."""
        try:
            with self._lock:
                tokens = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        except (UnicodeError, TypeError) as e:
            raise RefusedError(f"{where}: not valid Unicode: {e}", where) from e
        return self._checked(with_one_bos(tokens, self._tokenizer) if tokens else tokens, where)

    def _checked(self, tokens: list[int], where: str) -> tuple[int, ...]:
        if not tokens:
            raise RefusedError(f"{where}: no tokens", where)
        beyond = [token for token in tokens if not 0 <= token < self._size]
        if beyond:
            raise RefusedError(
                f"{where}: token {beyond[0]} is beyond the model's {self._size} embeddings", where
            )
        return tuple(tokens)


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a checked message for the template: content as one text, call arguments as objects."""
    role = _SAME_ROLE.get(str(message.get("role")), message.get("role"))
    if not isinstance(role, str) or role not in _ROLES:
        raise RefusedError(f"{where}.role: {role!r} is none of {', '.join(_ROLES)}", "messages")
    made: dict[str, Any] = {
        "role": role,
        "content": _content(message.get("content"), f"{where}.content"),
    }
    for field, value in message.items():
        if field not in _ROLES[role] and value is not None:
            raise RefusedError(f"{where}.{field}: not supported in a message of {role}", "messages")
        if field == "tool_calls" and value is not None:
            made[field] = [
                _call(call, f"{where}.tool_calls[{number}]")
                for number, call in enumerate(_list(value))
            ]
        elif field in ("name", "tool_call_id") and value is not None:
            made[field] = str(value)
        elif field == "refusal" and value:
            raise RefusedError(f"{where}.refusal: not supported", "messages")
    if "tool_calls" not in made and message.get("content") is None:
        raise RefusedError(f"{where}.content: missing", "messages")
    return made


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(_list(content)):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RefusedError(
                f"{where}[{number}]: parts of type {kind!r} are not supported, only text",
                "messages",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = json.loads(function["arguments"])
        return {
            "id": str(call["id"]),
            "type": "function",
            "function": {"name": str(function["name"]), "arguments": arguments},
        }
    except (KeyError, TypeError, ValueError) as e:
        raise RefusedError(
            f"{where}: expected a function call with JSON arguments ({e})", "messages"
        ) from None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RefusedError(f"messages: expected a list, got {type(value).__name__}", "messages")
    return value
