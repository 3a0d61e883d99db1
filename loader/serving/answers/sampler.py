"""Chooses the next token from the model's logits."""

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loader.serving.answers.events import TokenLogprob
from loader.serving.answers.request import Sampling

GREEDY_BELOW_TEMPERATURE = 1e-4
"""Below this temperature decoding is greedy: divided logits would overflow."""


class Sampler:
    """Chooses the tokens of one answer, with its own random generator: other answers do not change
    its numbers.
    """

    def __init__(
        self, sampling: Sampling, logprobs: int | None = None, matcher: Any = None
    ) -> None:
        """logprobs: as in `Request`. matcher: a `GrammarMatch`, or None."""
        self._sampling = sampling
        self._logprobs = logprobs
        self._matcher = matcher
        self._counts: Counter[int] = Counter()
        self._warpers = _warpers(sampling)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        penalty = sampling.repetition_penalty
        self._repetition = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1 else None

    def choose(self, logits: Tensor, tokens: Sequence[int]) -> TokenLogprob:
        """Return the token after `tokens` (prompt and answer so far).

        logits: [vocabulary]. `logprob` of the result is 0.0 unless logprobs were requested.
        """
        raw = logits.detach().to("cpu", torch.float32)
        scores = self._scores(raw.clone(), tokens)
        if self._sampling.temperature < GREEDY_BELOW_TEMPERATURE:
            token = int(scores.argmax())
        else:
            warped = self._warpers(None, scores[None])[0]
            token = int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))
        self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.accept(token)
        return (
            TokenLogprob(token, 0.0)
            if self._logprobs is None
            else self._reported(raw, token, self._logprobs)
        )

    @property
    def is_done(self) -> bool:
        """True if the grammar allows no further token."""
        return self._matcher is not None and bool(self._matcher.is_done)

    def _scores(self, scores: Tensor, tokens: Sequence[int]) -> Tensor:
        sampling = self._sampling
        if self._repetition is not None:
            scores = self._repetition(torch.tensor([tokens]), scores[None])[0]
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            seen = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            scores[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        for token, bias in sampling.bias.items():
            scores[token] += bias
        if self._matcher is not None:
            self._matcher.mask(scores)
        return scores

    def _reported(self, raw: Tensor, token: int, count: int) -> TokenLogprob:
        logprobs = raw.log_softmax(-1)
        values, tokens = logprobs.topk(count)
        top = zip(tokens.tolist(), values.tolist(), strict=True)
        return TokenLogprob(token, float(logprobs[token]), tuple(top))


def _warpers(sampling: Sampling) -> Any:
    """Return the warpers in the order of transformers' generate."""
    warpers = LogitsProcessorList()
    if sampling.temperature >= GREEDY_BELOW_TEMPERATURE and sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
