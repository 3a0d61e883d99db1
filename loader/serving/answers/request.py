"""A request: the prompt's tokens, the sampling, and the end of the answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.errors import MoeConvertError


class RefusedError(MoeConvertError):
    """The request is refused. parameter: the wrong field. code: OpenAI's error code."""

    status = 400

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    temperature 0 is greedy. These values are neutral: top_k 0, top_p 1, min_p 0, presence and
    frequency penalty 0, repetition_penalty 1. bias: token → number added to its logit. seed None:
    a random seed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """Everything that decides one answer.

    prompt: tokens, at least one. max_new_tokens: fits the context with the prompt. stop: texts that
    end the answer and are cut from it. logprobs: number of top tokens reported with each token, or
    None. grammar: compiled grammar, or None. spaced: True if the answer continues the prompt's
    text, so that its leading space counts. markers: special tokens that appear in the text.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Any = None
    spaced: bool = False
    markers: frozenset[int] = frozenset()
