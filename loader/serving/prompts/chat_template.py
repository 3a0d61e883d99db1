"""Turns messages or text into prompt tokens, with the chat template if the tokenizer has one."""

from collections.abc import Sequence
from typing import Any, Protocol

from formats.errors import MoeConvertError

Message = dict[str, Any]
"""Input of templates: {"role": "system" | "user" | "assistant", "content": text}."""

_HINT = "give another template, or remove what it rejects, such as a system message"


class Template(Protocol):
    """Turns messages into the tokens of a prompt."""

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt that an answer to `messages` follows."""


class ChatTemplate:
    """A Jinja template: `text`, or the tokenizer's."""

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._text = text

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt that an answer to `messages` follows.

        MoeConvertError with the template's message if it rejects them or fails.
        """
        prompt = self.render(messages)
        # The template writes BOS itself.
        ids = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise MoeConvertError(
                "the chat template turns the messages into an empty prompt", _HINT
            )
        return with_one_bos(ids, self._tokenizer)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt as text. Errors as in `ids`."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._text, add_generation_prompt=True, tokenize=False
            )
        except Exception as e:
            # A template is foreign code and may raise anything.
            reason = " ".join(str(e).split())[:200]
            raise MoeConvertError(
                f"the chat template fails: {type(e).__name__}: {reason}", _HINT
            ) from e
        return str(text)


class PlainText:
    """Replaces a missing template: the messages are lines of a text that the model continues."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of all messages as one text, with BOS if the tokenizer adds it."""
        return text_ids(self._tokenizer, "\n".join(message["content"] for message in messages))


def plain_template(tokenizer: Any) -> str:
    """Return a Jinja template that makes the same prompts as `PlainText`."""
    starts_with_bos = text_ids(tokenizer, "a")[0] == tokenizer.bos_token_id
    bos = "{{ bos_token }}" if starts_with_bos else ""
    return bos + r"{{ messages | map(attribute='content') | join('\n') }}"


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_of(tokenizer: Any, text: str | None = None) -> Template:
    """Return the template in `text`, else the tokenizer's, else `PlainText`."""
    if text is not None or has_template(tokenizer):
        return ChatTemplate(tokenizer, text)
    return PlainText(tokenizer)


def check_template(template: Template, system: str) -> None:
    """Raise MoeConvertError if `template` rejects a conversation with this system message.

    system: empty for a conversation without one.
    """
    messages = [{"role": "system", "content": system}] if system else []
    template.ids([*messages, {"role": "user", "content": "Hello"}])


def prompt_ids(tokenizer: Any, prompt: str, *, raw: bool = False) -> list[int]:
    """Return the tokens of `prompt`.

    It is the user's message if the tokenizer has a template and `raw` is False, else plain text.
    """
    if raw or not has_template(tokenizer):
        return text_ids(tokenizer, prompt)
    return ChatTemplate(tokenizer).ids([{"role": "user", "content": prompt}])


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of `text`, with one BOS if the tokenizer adds it.

    MoeConvertError if there are no tokens.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise MoeConvertError(
            "the prompt is empty and the tokenizer adds no BOS token", "give a prompt"
        )
    return with_one_bos(ids, tokenizer)


def with_one_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """Return `ids` with at most one BOS at the beginning. Text that spells BOS gets a second one
    from the tokenizer.
    """
    bos = tokenizer.bos_token_id
    repeated = 0
    while bos is not None and ids[repeated : repeated + 2] == [bos, bos]:
        repeated += 1
    return list(ids[repeated:])
