"""The answer to one request, as pieces of text with log-probabilities."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from loader.serving.answers.events import Piece, TokenLogprob
from loader.serving.answers.grammar import GrammarMatch
from loader.serving.answers.request import Request
from loader.serving.answers.sampler import Sampler
from loader.serving.answers.text_stream import TextStream
from loader.serving.answers.token_loop import generate_tokens
from loader.serving.answers.vocabulary import Vocabulary

_TOKENS_BEFORE = 8
"""Prompt tokens decoded with a completion; they decide if it begins with a space."""


class StreamedAnswer:
    """Generates the answer to one request.

    tokens: prompt and answer so far. reason: "stop" or "length", as in `End`; final when `pieces`
    is exhausted.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, request: Request) -> None:
        self._model = model
        self._request = request
        self._end_tokens = vocabulary.end_tokens
        matcher = (
            GrammarMatch(request.grammar, vocabulary.size) if request.grammar is not None else None
        )
        self._sampler = Sampler(request.sampling, request.logprobs, matcher)
        before = request.prompt[-_TOKENS_BEFORE:] if request.spaced else ()
        self._text = TextStream(vocabulary.decoder(request.markers), request.stop, before)
        self._pending: deque[TokenLogprob] = deque()
        self.tokens = list(request.prompt)
        self.prompt_tokens = len(request.prompt)
        self.reason = "length"

    @property
    def new_tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    def pieces(self, cache: Any, is_cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """Yield one piece per token; some are empty. cache: as in `generate_tokens`."""
        for chosen in generate_tokens(self._model, self.tokens, cache, self._sampler, is_cancelled):
            self.tokens.append(chosen.token)
            if chosen.token in self._end_tokens:
                self.reason = "stop"
                break
            yield self._piece(chosen)
            if self._text.stopped or self._sampler.is_done:
                self.reason = "stop"
                break
            if self.new_tokens == self._request.max_new_tokens:
                break
        yield Piece(self._text.finish(), self._complete(everything=not self._text.stopped))

    def _piece(self, chosen: TokenLogprob) -> Piece:
        begin = self._text.length
        text = self._text.push(chosen.token)
        if self._request.logprobs is not None:
            self._pending.append(TokenLogprob(chosen.token, chosen.logprob, chosen.top, begin))
        return Piece(text, self._complete())

    def _complete(self, everything: bool = False) -> tuple[TokenLogprob, ...]:
        """Remove and return the pending tokens whose text has been yielded."""
        complete = []
        while self._pending and (everything or self._pending[0].begin < len(self._text.text)):
            complete.append(self._pending.popleft())
        return tuple(complete)
