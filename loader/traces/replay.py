"""Replays a trace: what a cache with a given policy and number of slots would have hit, and what
guesses would have read. The policies are the engine's own objects, asked in the engine's order.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader.experts.policy import Order
from loader.traces.trace import Trace


@dataclass(frozen=True)
class Request:
    """What a layer is asked for at once: its different `experts`, in the order of their last use.

    prompt_tokens: 0 for a decoded token, whose number is `token`; else `token` is the number of the
    first one behind the prompt.
    """

    token: int
    experts: list[int]
    prompt_tokens: int = 0


@dataclass(frozen=True)
class LayerReplay:
    """One layer's replay.

    missed bool [tokens, chosen]: which of a decoded token's experts, by rank, were not in the
    cache; False for tokens of prompts. resident bool [tokens, experts]: what was in the cache
    before the token; for a token of a prompt, before that prompt. prompt_misses: experts read for
    prompts, each at most once a prompt.
    """

    missed: NDArray[np.bool_]
    resident: NDArray[np.bool_]
    prompt_misses: int


class BeladyPolicy:
    """Gives up what will be asked for last: no policy that sees the same requests misses less
    (Belady, IBM Systems Journal 5(2), 1966). `advance` is to be called before each of `requests`.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._asked = [request.experts for request in requests]
        self._at = 0
        self._upcoming: dict[int, list[int]] = {}
        """Expert -> the numbers of the requests that will ask for it, the next one at the end."""
        for number in range(len(requests) - 1, -1, -1):
            for expert in requests[number].experts:
                self._upcoming.setdefault(expert, [len(requests)]).append(number)
        self._present: set[int] = set()

    def advance(self) -> None:
        """The next request comes."""
        for expert in self._asked[self._at]:
            self._upcoming[expert].pop()
        self._at += 1

    def touch(self, expert: int) -> None:
        self._present.add(expert)

    def victim(self, pinned: Collection[int]) -> int:
        # Of equals the highest number, so that the choice does not depend on a set's order.
        expert = max(
            (e for e in self._present if e not in pinned), key=lambda e: (self._upcoming[e][-1], e)
        )
        self._present.remove(expert)
        return expert


def requests_of(trace: Trace, layer: int) -> list[Request]:
    """What `layer` is asked for, in order: a decoded token's experts by rank; a prompt's all at
    once.
    """
    experts = trace.experts[:, layer].tolist()
    requests: list[Request] = []
    begin = 0
    for sequence in trace.header.sequences:
        first, end = begin + sequence.prompt_tokens, begin + sequence.tokens
        if first > begin:
            latest = dict.fromkeys(
                e for token in reversed(experts[begin:first]) for e in reversed(token)
            )
            requests.append(Request(first, list(reversed(latest)), sequence.prompt_tokens))
        requests += [Request(token, experts[token]) for token in range(first, end)]
        begin = end
    return requests


def replay_layer(
    trace: Trace, layer: int, slots: int, policy: Callable[[], Order] | None
) -> LayerReplay:
    """Replays one layer over an empty cache; None as `policy` is Belady's.

    ValueError for more slots than there are experts, or fewer than none.
    """
    tokens, _, chosen = trace.experts.shape
    count = trace.header.architecture.num_local_experts
    if not 0 <= slots <= count:
        raise ValueError(f"{slots} slots: a layer has {count} experts")
    requests = requests_of(trace, layer)
    belady = BeladyPolicy(requests) if policy is None else None
    cache = ReplayedSlots(slots, belady or policy())  # type: ignore[misc]
    missed = np.zeros((tokens, chosen), bool)
    changes: list[tuple[int, int, int]] = []
    prompt_misses = 0
    for request in requests:
        if belady:
            belady.advance()
        misses = [expert not in cache.present for expert in request.experts]
        if request.prompt_tokens:
            prompt_misses += sum(misses)
        else:
            missed[request.token] = misses
        row = request.token + (request.prompt_tokens == 0)
        before = set(cache.present) if any(misses) else cache.present
        if request.prompt_tokens > 1:
            cache.stream(request.experts)
        else:
            cache.lease(request.experts)
        changes += [(row, expert, 1) for expert in cache.present - before]
        changes += [(row, expert, -1) for expert in before - cache.present]
    change = np.zeros((tokens + 2, count), np.int8)
    if changes:
        rows, experts, steps = np.array(changes).T
        np.add.at(change, (rows, experts), steps.astype(np.int8))
    return LayerReplay(
        missed, np.cumsum(change, axis=0, dtype=np.int8)[:tokens].astype(bool), prompt_misses
    )


class ReplayedSlots:
    """Which experts are in a layer's slots, as `loader.experts.slots.LayerSlots` decides it."""

    def __init__(self, slots: int, policy: Order) -> None:
        self.slots, self._policy = slots, policy
        self.present: set[int] = set()

    def lease(self, experts: Sequence[int]) -> None:
        """One token, by rank: no expert makes room for a later one, unless there are fewer slots
        than experts; then the last ones stay.
        """
        self._bring_in(experts, experts)
        for number, expert in enumerate(experts):
            if expert not in self.present:
                self._bring_in([expert], experts[number + 1 :])
            if expert in self.present:
                self._policy.touch(expert)

    def stream(self, experts: Sequence[int]) -> None:
        """Many tokens: the last used stay; of the others, those that were there count as used."""
        keep = experts[max(0, len(experts) - self.slots) :]
        for expert in sorted(self.present.intersection(experts).difference(keep)):
            self._policy.touch(expert)
        self._bring_in(keep, keep)
        for expert in keep:
            self._policy.touch(expert)

    def _bring_in(self, experts: Iterable[int], pinned: Sequence[int]) -> None:
        """Those of `experts` for which one that is not `pinned` can leave."""
        for expert in experts:
            if expert in self.present:
                continue
            if len(self.present) >= self.slots:
                if self.present.issubset(pinned):
                    return
                self.present.remove(self._policy.victim(pinned))
            self.present.add(expert)


def uses_guess(trace: Trace, layer: int, guesses: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of the `guesses` [tokens, n] for `layer` its router chose: bool [tokens, n]."""
    used: NDArray[np.bool_] = (guesses[:, :, None] == trace.experts[:, layer, None, :]).any(2)
    return used


def recall(trace: Trace, guesses: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The share of each layer's experts that were among its best 1, 2, ... guesses, over decoded
    tokens, whatever is in a cache: float64 [layers - 1, guesses]. `guesses` is `trace.guesses` or
    `trace.guesses_next_norm`.
    """
    decoded = decoded_tokens(trace)
    chosen = trace.experts.shape[2]
    found = [
        uses_guess(trace, layer + 1, guesses[:, layer])[decoded]
        for layer in range(guesses.shape[1])
    ]
    shares = [
        np.cumsum(f.mean(0)) / chosen if len(f) else np.zeros(guesses.shape[2]) for f in found
    ]
    return np.array(shares).reshape(guesses.shape[1], guesses.shape[2])


def decoded_tokens(trace: Trace) -> NDArray[np.bool_]:
    """bool [tokens]: which tokens are no prompt's."""
    sizes = [(s.prompt_tokens, s.tokens - s.prompt_tokens) for s in trace.header.sequences]
    decoded: NDArray[np.bool_] = np.repeat(
        np.tile([False, True], len(sizes)), np.array(sizes).ravel()
    )
    return decoded
