"""One answer by transformers' generate, for `generate` and `chat`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from loader.hf.private_names import cache_field
from loader.serving.answers.settings import GenerationSettings
from loader.serving.answers.text_stream import TextStream
from loader.serving.prefixes.prefix_cache import PrefixCache

OnText = Callable[[str], None]
"""Called after each token with its new text, which may be empty, and once at the end."""
FinishReason = Literal["stop", "length", "cancelled", "interrupted"]


@dataclass(frozen=True)
class Answer:
    """The result of a generation.

    finish_reason: "stop" (end token or stop string), "length" (max_new_tokens reached), "cancelled"
    (`stop` was called) or "interrupted" (an exception). reused_tokens: prompt tokens found in the
    prefix cache. first_token_s: seconds until the first token, None without one. tokens_per_s:
    speed after the first token, None with fewer than two.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    seconds: float
    first_token_s: float | None
    tokens_per_s: float | None

    @property
    def new_tokens(self) -> int:
        """Number of tokens in the answer."""
        return len(self.token_ids)


class Generation:
    """Generates one answer to the tokens `prompt`. `answer` is valid even after an interrupt."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: Sequence[int],
        settings: GenerationSettings,
        cache: PrefixCache,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._settings = settings
        self._cache = cache
        self._end_tokens = end_tokens(model, tokenizer)
        self._text = TextStream(tokenizer, settings.stop)
        self._token_ids: list[int] = []
        self._reused = 0
        self._is_cancelled = False
        self._begin_s = time.perf_counter()
        self._token_s: list[float] = []

    def run(self, on_text: OnText) -> Answer:
        """Generate in this thread until the answer ends. on_text: receives the pieces of text."""
        settings = self._settings
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        self._begin_s = time.perf_counter()
        self._reused = self._cache.begin(self._prompt)
        ids = torch.tensor([self._prompt], device=self._model.device)
        arguments = settings.arguments()
        if self._end_tokens:
            arguments["eos_token_id"] = sorted(self._end_tokens)
        try:
            with torch.inference_mode():
                self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    # Not a streamer: some releases of transformers call it after the stopping
                    # criteria, and a stop would come one token late.
                    stopping_criteria=[lambda ids, scores, **_: self._take(ids, on_text)],
                    # Without an id transformers warns at every call.
                    pad_token_id=_pad_token(self._model, self._tokenizer),
                    **{cache_field(): self._cache.kv},
                    **arguments,
                )
        finally:
            self._cache.record([*self._prompt, *self._token_ids])
        on_text(self._text.finish())
        return self.answer

    def stop(self) -> None:
        """End the answer after the current token. Any thread may call this."""
        self._is_cancelled = True

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        times_s = self._token_s
        count = len(times_s)
        return Answer(
            text=self._text.text,
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason(),
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            seconds=time.perf_counter() - self._begin_s,
            first_token_s=times_s[0] - self._begin_s if times_s else None,
            tokens_per_s=(count - 1) / (times_s[-1] - times_s[0]) if count > 1 else None,
        )

    def _take(self, ids: Any, on_text: OnText) -> Any:
        """Record the last of `ids` [1, tokens]. Return bool [1], True if the answer is over."""
        token = int(ids[0, -1])
        self._token_s.append(time.perf_counter())
        self._token_ids.append(token)
        on_text(self._text.push(token))
        is_over = self._is_cancelled or self._text.stopped
        return torch.full((1,), is_over, dtype=torch.bool, device=ids.device)

    def _finish_reason(self) -> FinishReason:
        ids = self._token_ids
        if self._text.stopped or (ids and ids[-1] in self._end_tokens):
            return "stop"
        if len(ids) >= self._settings.max_new_tokens:
            return "length"
        return "cancelled" if self._is_cancelled else "interrupted"


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: of generation_config, and the tokenizer's EOS."""
    configured = model.generation_config.eos_token_id
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    return frozenset(
        int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None and token >= 0
    )


def _pad_token(model: Any, tokenizer: Any) -> int | None:
    """Return the padding token, or EOS if the model has none."""
    for token in (
        model.generation_config.pad_token_id,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    ):
        if token is not None:
            return int(token)
    return None
