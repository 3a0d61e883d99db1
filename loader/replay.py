"""Replays a trace: what a cache with a given policy and number of slots would have hit, and what guesses would have
read. The policies are the engine's own objects, asked in the engine's order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader.policy import Policy
from loader.trace import Trace

Request = tuple[int, list[int]]
"""The number of a decoded token, or -1 for a prompt, and the experts that a layer asks for at once."""


@dataclass(frozen=True)
class LayerReplay:
    """One layer's replay.

    missed bool [tokens, chosen]: which of a decoded token's experts, by rank, were not in the cache; False for tokens
    of prompts. resident bool [tokens, experts]: what was in the cache before the token; for a token of a prompt, before
    that prompt. prompt_misses: experts read for prompts, each once a prompt and layer where the slots suffice.
    """

    missed: NDArray[np.bool_]
    resident: NDArray[np.bool_]
    prompt_misses: int


class BeladyPolicy:
    """Gives up what will be used last: no policy that sees the same requests misses less (Belady, IBM Systems Journal
    5(2), 1966). It must be touched in exactly the order of `uses`, from which it knows the future."""

    def __init__(self, uses: Sequence[int]) -> None:
        following: dict[int, int] = {}
        self._following = [0] * len(uses)
        for at in range(len(uses) - 1, -1, -1):
            self._following[at] = following.get(uses[at], len(uses))
            following[uses[at]] = at
        self._at = 0
        self._present: dict[int, int] = {}

    def touch(self, expert: int) -> None:
        self._present[expert] = self._following[self._at]
        self._at += 1

    def victim(self, pinned: Iterable[int]) -> int:
        expert = max((e for e in self._present if e not in pinned), key=self._present.__getitem__)
        del self._present[expert]
        return expert


def requests_of(trace: Trace, layer: int, slots: int) -> list[Request]:
    """What `layer` asks a cache of `slots` experts for, in order: a decoded token for its experts by rank; a prompt for
    all that its tokens use, ascending, at most `slots` at a time."""
    experts = trace.experts[:, layer]
    requests: list[Request] = []
    begin = 0
    for sequence in trace.header.sequences:
        first = begin + sequence.prompt_tokens
        end = begin + sequence.tokens
        used = np.unique(experts[begin:first]).tolist()
        requests += [(-1, used[i : i + slots]) for i in range(0, len(used), slots)]
        requests += zip(range(first, end), experts[first:end].tolist(), strict=True)
        begin = end
    return requests


def replay_layer(trace: Trace, layer: int, slots: int, policy: Callable[[], Policy] | None) -> LayerReplay:
    """Replays one layer over an empty cache; None as `policy` is Belady's.

    ValueError if `slots` do not hold one token's experts.

    Hits are counted before misses come in, and no expert of a request makes room for another of it.
    """
    tokens, _, chosen = trace.experts.shape
    count = trace.header.architecture.num_local_experts
    if not chosen <= slots <= count:
        raise ValueError(f"{slots} slots: a token has {chosen} experts, a layer {count}")
    requests = requests_of(trace, layer, slots)
    order = BeladyPolicy([e for _, experts in requests for e in experts]) if policy is None else policy()
    touch, victim = order.touch, order.victim
    present: set[int] = set()
    missed = np.zeros((tokens, chosen), bool)
    came: list[tuple[int, int]] = []
    went: list[tuple[int, int]] = []
    prompt_misses, upcoming = 0, 0
    for token, experts in requests:
        misses = [e for e in experts if e not in present]
        if misses:
            if token < 0:
                prompt_misses += len(misses)
                at = upcoming
            else:
                missed[token] = [e not in present for e in experts]
                at = token + 1
            for _ in range(len(present) + len(misses) - slots):
                out = victim(experts)
                present.remove(out)
                went.append((at, out))
            present.update(misses)
            came.extend((at, e) for e in misses)
        if token >= 0:
            upcoming = token + 1
        for e in experts:
            touch(e)
    change = np.zeros((tokens + 1, count), np.int8)
    for events, step in ((came, 1), (went, -1)):
        if events:
            np.add.at(change, tuple(np.array(events).T), step)
    return LayerReplay(missed, np.cumsum(change, axis=0, dtype=np.int8)[:tokens].astype(bool), prompt_misses)


def uses_guess(trace: Trace, layer: int, guesses: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of the `guesses` [tokens, n] for `layer` its router chose: bool [tokens, n]."""
    used: NDArray[np.bool_] = (guesses[:, :, None] == trace.experts[:, layer, None, :]).any(2)
    return used


def recall(trace: Trace, guesses: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The share of each layer's experts that were among its best 1, 2, ... guesses, over decoded tokens, whatever is in
    a cache: float64 [layers - 1, guesses]. `guesses` is `trace.guesses` or `trace.guesses_next_norm`."""
    decoded = decoded_tokens(trace)
    chosen = trace.experts.shape[2]
    found = [uses_guess(trace, layer + 1, guesses[:, layer])[decoded] for layer in range(guesses.shape[1])]
    shares = [np.cumsum(f.mean(0)) / chosen if len(f) else np.zeros(guesses.shape[2]) for f in found]
    return np.array(shares).reshape(guesses.shape[1], guesses.shape[2])


def decoded_tokens(trace: Trace) -> NDArray[np.bool_]:
    """bool [tokens]: which tokens are no prompt's."""
    sizes = [(s.prompt_tokens, s.tokens - s.prompt_tokens) for s in trace.header.sequences]
    decoded: NDArray[np.bool_] = np.repeat(np.tile([False, True], len(sizes)), np.array(sizes).ravel())
    return decoded
