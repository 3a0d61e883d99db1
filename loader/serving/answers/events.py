"""Events of an answer: pieces of text, then its end or a failure."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token with its log-probability, before penalties, temperature and grammar.

    top: (token, log-probability) of the most likely tokens, in order. begin: offset of its text in
    the answer, in characters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    begin: int = 0


@dataclass(frozen=True)
class Piece:
    """The next text of the answer. logprobs: tokens whose text is now complete, if requested."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens. cached: prompt tokens found in a prefix cache. new: generated tokens,
    including an end token.
    """

    prompt: int
    cached: int
    new: int


@dataclass(frozen=True)
class End:
    """The answer is complete. reason: "stop" (end token, stop text or end of the grammar) or
    "length".
    """

    reason: str
    counts: Counts


@dataclass(frozen=True)
class Failure:
    """The answer failed. cancelled: True if its client or a shutdown ended it; else `error` gives
    the cause.
    """

    error: str = ""
    cancelled: bool = False
    counts: Counts = field(default_factory=lambda: Counts(0, 0, 0))


Event = Piece | End | Failure
