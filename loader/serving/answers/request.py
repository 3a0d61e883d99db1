"""What decides an answer: the prompt's tokens, how tokens are chosen, and where the answer ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from formats.errors import MoeConvertError


class RefusedError(MoeConvertError):
    """A request that cannot be served as it is: `parameter` names what is wrong, `code` is the
    interface's word.
    """

    status = 400

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0: the likeliest. top_k 0, top_p 1, min_p 0, penalties 0
    and a repetition penalty of 1 change nothing. bias: added to the logits of tokens. seed None:
    another answer each time.
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
    """One generation.

    prompt: tokens, at least one. max_new_tokens: at most as many as the context has room for. stop:
    texts that end the answer and are not in it. logprobs: None, or how many of the likeliest tokens
    to report beside each chosen one.
    grammar: a compiled grammar that the answer follows, or None. spaced: the text goes on where the
    prompt's text ends, so that a leading space counts. markers: special tokens that are text all
    the same.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Any = None
    spaced: bool = False
    markers: frozenset[int] = frozenset()
