"""Replays a trace: the hits of a cache with a given policy and number of slots.

The policies are the expert cache's own objects, called in the expert cache's order.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader.experts.policy import Order
from loader.traces.trace import Trace


@dataclass(frozen=True)
class Request:
    """A layer's requests for one decoded token, or for one prompt.

    experts: the different experts, in the order of their last use. prompt_tokens: tokens of the
    prompt; 0 for a decoded token. token: number of the decoded token, or of the first token after
    the prompt.
    """

    token: int
    experts: list[int]
    prompt_tokens: int = 0


@dataclass(frozen=True)
class LayerReplay:
    """One layer's replay.

    missed: bool [tokens, chosen], True for each expert of a decoded token, by rank, that had no
    slot; False for tokens of prompts. resident: bool [tokens, experts], True for each expert with a
    slot before the token, or before the prompt of the token. prompt_misses: experts read for
    prompts, each at most once for a prompt.
    """

    missed: NDArray[np.bool_]
    resident: NDArray[np.bool_]
    prompt_misses: int


class BeladyPolicy:
    """The optimal policy; it needs to know future requests.

    It evicts the expert whose next request is the latest (Belady, IBM Systems Journal 5(2), 1966).
    Call `advance` before each request.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._asked = [request.experts for request in requests]
        self._at = 0
        self._upcoming: dict[int, list[int]] = {}
        """Expert -> numbers of its future requests, the next one at the end."""
        for number in range(len(requests) - 1, -1, -1):
            for expert in requests[number].experts:
                self._upcoming.setdefault(expert, [len(requests)]).append(number)
        self._present: set[int] = set()

    def advance(self) -> None:
        """Go on to the next request."""
        for expert in self._asked[self._at]:
            self._upcoming[expert].pop()
        self._at += 1

    def touch(self, expert: int) -> None:
        self._present.add(expert)

    def victim(self, pinned: Collection[int]) -> int:
        # Among equals the highest number: the choice must not depend on the order of a set.
        expert = max(
            (e for e in self._present if e not in pinned), key=lambda e: (self._upcoming[e][-1], e)
        )
        self._present.remove(expert)
        return expert


def requests_of(trace: Trace, layer: int) -> list[Request]:
    """Return a layer's requests in order: one for each decoded token, one for each prompt."""
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
    """Replay one layer, starting with empty slots.

    policy: makes the eviction policy; None is Belady's. Raises ValueError unless `slots` is 0 to
    the number of experts.
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
    """The experts in a layer's slots, by the rules of `loader.experts.slots.LayerSlots`."""

    def __init__(self, slots: int, policy: Order) -> None:
        self.slots, self._policy = slots, policy
        self.present: set[int] = set()

    def lease(self, experts: Sequence[int]) -> None:
        """Request one token's experts, by rank.

        None of them is evicted for another one. With fewer slots than experts, the last ones stay.
        """
        self._bring_in(experts, experts)
        for number, expert in enumerate(experts):
            if expert not in self.present:
                self._bring_in([expert], experts[number + 1 :])
            if expert in self.present:
                self._policy.touch(expert)

    def stream(self, experts: Sequence[int]) -> None:
        """Request many tokens' experts. The last used stay; hits among the others count as used."""
        keep = experts[max(0, len(experts) - self.slots) :]
        for expert in sorted(self.present.intersection(experts).difference(keep)):
            self._policy.touch(expert)
        self._bring_in(keep, keep)
        for expert in keep:
            self._policy.touch(expert)

    def _bring_in(self, experts: Iterable[int], pinned: Sequence[int]) -> None:
        """Give slots to `experts`, as far as experts that are not `pinned` can leave."""
        for expert in experts:
            if expert in self.present:
                continue
            if len(self.present) >= self.slots:
                if self.present.issubset(pinned):
                    return
                self.present.remove(self._policy.victim(pinned))
            self.present.add(expert)


def uses_guess(trace: Trace, layer: int, guesses: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return bool [tokens, n]: True for each of the `guesses` that the layer's router chose."""
    used: NDArray[np.bool_] = (guesses[:, :, None] == trace.experts[:, layer, None, :]).any(2)
    return used


def recall(trace: Trace, guesses: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the share of each layer's experts among its best 1, 2, ... guesses.

    guesses: `trace.guesses` or `trace.guesses_next_norm`. The result is float64 [layers - 1,
    guesses], over decoded tokens, regardless of a cache.
    """
    decoded = decoded_tokens(trace)
    chosen = trace.experts.shape[2]
    shares = []
    for layer in range(guesses.shape[1]):
        right = uses_guess(trace, layer + 1, guesses[:, layer])[decoded]
        shares.append(
            np.cumsum(right.mean(0)) / chosen if len(right) else np.zeros(guesses.shape[2])
        )
    return np.array(shares).reshape(guesses.shape[1], guesses.shape[2])


def decoded_tokens(trace: Trace) -> NDArray[np.bool_]:
    """Return bool [tokens]: True for tokens that are not part of a prompt."""
    sizes = [(s.prompt_tokens, s.tokens - s.prompt_tokens) for s in trace.header.sequences]
    decoded: NDArray[np.bool_] = np.repeat(
        np.tile([False, True], len(sizes)), np.array(sizes).ravel()
    )
    return decoded
