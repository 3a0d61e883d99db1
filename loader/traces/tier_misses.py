"""Miss ratios of a GPU's slots and of the RAM behind them, by replay of routing through both."""

import functools
from collections.abc import Callable, Iterable

import numpy as np

from formats.index import Architecture
from loader.experts.policy import LrfuPolicy, Policy
from loader.traces.replay import ReplayedSlots, Request, requests_of
from loader.traces.trace import Trace

UNIFORM_TOKENS = 4096
"""Tokens of the random routing."""

TierMisses = Callable[[int, int, int], tuple[float, float]]
"""(layer, its slots on the GPU, its experts in RAM) -> (share of the requested experts that are not
on the GPU, share that are neither on the GPU nor in RAM).
"""


def replay_tiers(
    requests: Iterable[Request], gpu: int, ram: int, policy: Callable[[], Policy]
) -> tuple[int, int]:
    """Return (misses of the GPU, misses of GPU and RAM) of one layer's decoded tokens.

    gpu: slots on the GPU. ram: experts in RAM. RAM is asked only for experts that miss on the GPU,
    one after the other, and keeps an expert that is copied to the GPU. Both start empty.
    """
    slots, tier = ReplayedSlots(gpu, policy()), ReplayedSlots(ram, LrfuPolicy())
    misses = tier_misses = 0
    for request in requests:
        missed = [expert for expert in request.experts if expert not in slots.present]
        if request.prompt_tokens > 1:
            slots.stream(request.experts)
        else:
            slots.lease(request.experts)
        for expert in missed:
            if not request.prompt_tokens:
                misses += 1
                tier_misses += expert not in tier.present
            tier.lease([expert])
    return misses, tier_misses


def uniform_tier_misses(architecture: Architecture, policy: Callable[[], Policy]) -> TierMisses:
    """Return the miss ratios if all experts are equally likely.

    The GPU's is 1 - slots / experts. That of RAM depends on what both hold; it comes from a replay
    of random routing.
    """
    count, chosen = architecture.num_local_experts, architecture.num_experts_per_tok

    @functools.cache
    def misses(gpu: int, ram: int) -> tuple[float, float]:
        on_gpu = 1 - gpu / count
        if ram >= count or gpu >= count:
            return on_gpu, 0.0
        keys = np.random.default_rng(0).random((UNIFORM_TOKENS, count))
        routing = np.argsort(keys, axis=1)[:, :chosen].tolist()
        missed, both = replay_tiers(
            (Request(*item) for item in enumerate(routing)), gpu, ram, policy
        )
        return on_gpu, on_gpu * both / missed

    return lambda layer, gpu, ram: misses(gpu, ram)


def traced_tier_misses(trace: Trace, policy: Callable[[], Policy]) -> TierMisses:
    """Return the miss ratios of a trace's decoded tokens.

    With all experts in RAM no request misses it, not even the first.
    """
    count = trace.header.architecture.num_local_experts
    decoded = sum(sequence.tokens - sequence.prompt_tokens for sequence in trace.header.sequences)
    needed = max(1, decoded * trace.experts.shape[2])

    def misses(layer: int, gpu: int, ram: int) -> tuple[float, float]:
        missed, both = replay_tiers(requests_of(trace, layer), gpu, ram, policy)
        return missed / needed, both / needed if ram < count else 0.0

    return misses
