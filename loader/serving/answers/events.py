"""What a job tells whoever waits for it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token with its log-probability under the model, before penalties, temperature and
    grammar; `top`: the likeliest tokens, likeliest first. begin: where its text begins in the
    answer, in characters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    begin: int = 0


@dataclass(frozen=True)
class Piece:
    """More text of the answer, with the tokens that are complete in it where logprobs were asked
    for.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Counts:
    """Tokens. cached: of the prompt, found in a prefix cache. new: chosen by the model, an end
    token included.
    """

    prompt: int
    cached: int
    new: int


@dataclass(frozen=True)
class End:
    """The answer is complete. reason: "stop" (an end token, a stop text, the end of the grammar) or
    "length".
    """

    reason: str
    counts: Counts


@dataclass(frozen=True)
class Failure:
    """There is no more. cancelled: by its client or the end of the server, else `error` says what
    went wrong.
    """

    error: str = ""
    cancelled: bool = False
    counts: Counts = field(default_factory=lambda: Counts(0, 0, 0))


Event = Piece | End | Failure
