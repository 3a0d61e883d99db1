"""A conversation: messages, template, KV cache and settings."""

from dataclasses import replace
from typing import Any

import torch

from formats.errors import MoeConvertError
from loader.hf.loading.tokenizer import check_tokens, embedding_rows
from loader.serving.answers.generation import Answer, Generation, OnText
from loader.serving.answers.settings import GenerationSettings
from loader.serving.prefixes.prefix_cache import PrefixCache
from loader.serving.prompts.chat_template import Message, Template


class ContextFullError(MoeConvertError):
    """The prompt of `prompt_tokens` leaves no room for an answer in `context_tokens`."""

    def __init__(self, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(
            f"the context is full: the conversation has {prompt_tokens} of {context_tokens} tokens",
            "drop the oldest turns, or start over with /reset",
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class Session:
    """One conversation with a model. An interrupt ends the answer but keeps the session.

    context_tokens: maximum of prompt and answer together; None is the model's maximum. Raises
    MoeConvertError if the template rejects the system message.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        settings: GenerationSettings,
        *,
        system: str = "",
        context_tokens: int | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._cache = PrefixCache(model)
        self._turns: list[tuple[Message, Message]] = []
        self._system = ""
        made_for = model.config.get_text_config(decoder=True).max_position_embeddings
        self.context_tokens: int = min(context_tokens or made_for, made_for)
        self.settings = settings
        self.answers: list[Answer] = []
        """All answers of the session, in order."""
        self.set_system(system)

    @property
    def system(self) -> str:
        """The system message, or an empty string."""
        return self._system

    @property
    def messages(self) -> list[Message]:
        """The system message, then questions and answers in turn."""
        return self._messages(0)

    @property
    def turns(self) -> int:
        """Number of questions with an answer."""
        return len(self._turns)

    def set_system(self, text: str) -> None:
        """Set the system message and keep the turns. MoeConvertError if the template rejects it."""
        before = self._system
        self._system = text
        try:
            self._prompt("Hello", 0)
        except MoeConvertError:
            self._system = before
            raise

    def ask(self, text: str, on_text: OnText) -> Answer:
        """Answer `text` and add both to the conversation. on_text: receives the answer's pieces.

        If an exception interrupts the answer, its generated part is kept. ContextFullError if the
        prompt leaves too little room. MoeConvertError if the template rejects it, or if a token is
        beyond the model's embeddings.
        """
        prompt = self._prompt(text, 0)
        if not self._has_room(len(prompt)):
            raise ContextFullError(len(prompt), self.context_tokens)
        room = self.context_tokens - len(prompt)
        settings = replace(self.settings, max_new_tokens=min(self.settings.max_new_tokens, room))
        generation = Generation(self._model, self._tokenizer, prompt, settings, self._cache)
        try:
            return generation.run(on_text)
        finally:
            answer = generation.answer
            if answer.token_ids:
                self.answers.append(answer)
                self._turns.append((_message("user", text), _message("assistant", answer.text)))

    def turns_to_drop(self, text: str) -> int | None:
        """Return the number of oldest turns to drop so that an answer to `text` fits.

        None if `text` alone does not fit.
        """
        fits = (
            count
            for count in range(len(self._turns) + 1)
            if self._has_room(len(self._prompt(text, count)))
        )
        return next(fits, None)

    def drop(self, turns: int) -> None:
        """Forget the oldest `turns`."""
        del self._turns[:turns]

    def reset(self) -> None:
        """Forget all turns. System message and settings stay."""
        self._turns.clear()
        self._cache.clear()

    def _has_room(self, prompt_tokens: int) -> bool:
        """True if an answer fits: of maximum length, or of a quarter of the context."""
        return (
            prompt_tokens + min(self.settings.max_new_tokens, self.context_tokens // 4)
            <= self.context_tokens
        )

    def _messages(self, dropped: int) -> list[Message]:
        system = [_message("system", self._system)] if self._system else []
        return system + [message for turn in self._turns[dropped:] for message in turn]

    def _prompt(self, text: str, dropped: int) -> list[int]:
        ids = self._template.ids([*self._messages(dropped), _message("user", text)])
        check_tokens(torch.tensor(ids), self._tokenizer, embedding_rows(self._model), "the message")
        return ids


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
