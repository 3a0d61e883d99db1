"""Messages or a prompt as tokens: by the tokenizer's chat template where there is one, else as
plain text.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from formats.errors import MoeConvertError

Message = dict[str, Any]
"""What templates read: {"role": "system" | "user" | "assistant", "content": text}."""

_HINT = "give another template, or leave out what it refuses (a system message, for example)"


class Template(Protocol):
    """Turns messages into the tokens of a prompt."""

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt that an answer to `messages` follows."""


class ChatTemplate:
    """A Jinja template: `text`, or that of the tokenizer."""

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._text = text

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt that an answer to `messages` follows.

        MoeConvertError with the template's own words if it refuses them, or fails.
        """
        prompt = self.render(messages)
        # The template writes BOS itself.
        ids = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise MoeConvertError("the chat template makes an empty prompt of the messages", _HINT)
        return with_one_bos(ids, self._tokenizer)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt's text; errors as `ids`."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._text, add_generation_prompt=True, tokenize=False
            )
        except Exception as e:
            # A template is a program from somebody else: it may raise anything.
            reason = " ".join(str(e).split())[:200]
            raise MoeConvertError(
                f"the chat template fails: {type(e).__name__}: {reason}", _HINT
            ) from e
        return str(text)


class PlainText:
    """No template: the messages are one running text, each on a line of its own, and the model
    continues it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of the text so far, with the BOS token that the tokenizer adds."""
        return text_ids(self._tokenizer, "\n".join(message["content"] for message in messages))


def has_template(tokenizer: Any) -> bool:
    """True if the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_of(tokenizer: Any, text: str | None = None) -> Template:
    """Return the template of `text` if given, else the tokenizer's, else `PlainText`."""
    if text is not None or has_template(tokenizer):
        return ChatTemplate(tokenizer, text)
    return PlainText(tokenizer)


def check_template(template: Template, system: str) -> None:
    """MoeConvertError unless `template` takes a conversation with this system message (empty:
    none).
    """
    messages = [{"role": "system", "content": system}] if system else []
    template.ids([*messages, {"role": "user", "content": "Hello"}])


def prompt_ids(tokenizer: Any, prompt: str, *, raw: bool = False) -> list[int]:
    """Return the tokens of `prompt`: as the user's message where the tokenizer has a template,
    unless `raw`.
    """
    if raw or not has_template(tokenizer):
        return text_ids(tokenizer, prompt)
    return ChatTemplate(tokenizer).ids([{"role": "user", "content": prompt}])


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of `text`, with one BOS if the tokenizer adds it. MoeConvertError if there
    is none at all.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise MoeConvertError(
            "the prompt is empty and the tokenizer adds no BOS token", "give a prompt"
        )
    return with_one_bos(ids, tokenizer)


def with_one_bos(ids: list[int], tokenizer: Any) -> list[int]:
    """Return `ids` with one BOS token where several stand at the beginning: a text may spell the
    one that is added.
    """
    bos = tokenizer.bos_token_id
    repeated = 0
    while bos is not None and ids[repeated : repeated + 2] == [bos, bos]:
        repeated += 1
    return list(ids[repeated:])
