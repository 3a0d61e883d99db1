"""A conversation with a loaded model: template, KV cache and settings."""

from dataclasses import replace
from typing import Any

import torch

from formats.errors import MoeConvertError
from loader.hf.loading.tokenizer import check_tokens, embedding_rows
from loader.serving.answers.generation import Answer, Generation
from loader.serving.answers.settings import GenerationSettings
from loader.serving.conversation import ContextFullError, Conversation, OnText
from loader.serving.prefixes.prefix_cache import PrefixCache
from loader.serving.prompts.chat_template import Template


class Session(Conversation):
    """One conversation with a model. An interrupt ends the answer but keeps the session.

    context_tokens: maximum of prompt and answer together; None is the model's maximum. Raises
    MoeConvertError if the template rejects the system message.
    """

    context_tokens: int

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
        made_for = model.config.get_text_config(decoder=True).max_position_embeddings
        super().__init__(settings, "", min(context_tokens or made_for, made_for))
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._cache = PrefixCache(model)
        self.set_system(system)

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
        """Implement `Conversation.ask`.

        MoeConvertError if the template rejects the conversation, or if a token is beyond the
        model's embeddings.
        """
        prompt = self._prompt(text, 0)
        if not self._has_room(len(prompt)):
            raise ContextFullError(
                f"the context is full: the conversation has {len(prompt)} of"
                f" {self.context_tokens} tokens"
            )
        room = self.context_tokens - len(prompt)
        settings = replace(self.settings, max_new_tokens=min(self.settings.max_new_tokens, room))
        generation = Generation(self._model, self._tokenizer, prompt, settings, self._cache)
        try:
            return generation.run(on_text)
        finally:
            answer = generation.answer
            if answer.token_ids:
                self._add(text, answer)

    def turns_to_drop(self, text: str) -> int | None:
        """Implement `Conversation.turns_to_drop`."""
        fits = (
            count
            for count in range(len(self._turns) + 1)
            if self._has_room(len(self._prompt(text, count)))
        )
        return next(fits, None)

    def reset(self) -> None:
        """Forget all turns. System message and settings stay."""
        super().reset()
        self._cache.clear()

    def _has_room(self, prompt_tokens: int) -> bool:
        """True if an answer fits: of maximum length, or of a quarter of the context."""
        return (
            prompt_tokens + min(self.settings.max_new_tokens, self.context_tokens // 4)
            <= self.context_tokens
        )

    def _prompt(self, text: str, dropped: int) -> list[int]:
        ids = self._template.ids(self._with_question(text, dropped))
        check_tokens(torch.tensor(ids), self._tokenizer, embedding_rows(self._model), "the message")
        return ids
