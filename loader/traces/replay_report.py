"""Replays one trace with all combinations of policies, slots and guesses; a report for JSON."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loader.experts.policy import POLICIES, fixed_policies
from loader.traces.replay import LayerReplay, decoded_tokens, recall, replay_layer
from loader.traces.replay_reads import reads_of
from loader.traces.slot_shares import least_cost_slots, miss_bytes
from loader.traces.trace import Trace

OPTIMUM = "belady"


@dataclass(frozen=True)
class Settings:
    """The combinations to replay.

    policies: names in POLICIES, or "fixed". slots: slots of each layer, or their mean without
    equal_shares. guesses: prefetched experts; 0 for no prefetch. next_norm: see `reads_of`.
    bytes_per_s: name -> speed of a disk or link. compute_s: seconds that a layer computes.
    choose_from: trace that chooses the experts of "fixed" and the unequal slots.
    """

    policies: Sequence[str]
    slots: Sequence[int]
    guesses: Sequence[int] = (0,)
    next_norm: bool = True
    bytes_per_s: dict[str, float] = field(default_factory=dict)
    compute_s: float = 0.0
    choose_from: Trace | None = None
    equal_shares: bool = True


def replay_trace(
    trace: Trace, settings: Settings, *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Return the replays of `trace` with all `settings`, and with Belady's policy, for JSON.

    Keys: `model`, tokens, `layers` and so on; `recall`, by norm: [layers - 1][guesses]; `runs`, one
    for each policy and number of slots, with hit ratios, and reads for each number of guesses.
    Belady's policy gets equal slots. Raises ValueError for settings that the trace does not allow.
    """
    decoded = decoded_tokens(trace)
    architecture = trace.header.architecture
    runs = []
    for name in (*settings.policies, OPTIMUM):
        factories = _factories(name, settings, architecture.expert_layers)
        costs = None
        if not settings.equal_shares and settings.choose_from is not None and name != OPTIMUM:
            costs = miss_bytes(settings.choose_from, factories)
        for slots in settings.slots:
            shares = [slots] * architecture.expert_layers
            if costs is not None:
                shares = least_cost_slots(costs, sum(shares))
            replays = [
                replay_layer(trace, layer, share, factory)
                for layer, (share, factory) in enumerate(zip(shares, factories, strict=True))
            ]
            ratios = [_hit_ratio(replay, decoded) for replay in replays]
            runs.append(
                {
                    "policy": name,
                    "slots": slots,
                    "hit_ratio": float(np.mean(ratios)),
                    "prompt_bytes": sum(
                        replay.prompt_misses * size
                        for replay, size in zip(replays, trace.header.expert_bytes, strict=True)
                    ),
                    "layers": [
                        {"slots": s, "hit_ratio": r} for s, r in zip(shares, ratios, strict=True)
                    ],
                    "reads": [
                        _reads(trace, replays, number, settings) for number in settings.guesses
                    ],
                }
            )
            if progress:
                progress(f"{name}, {slots} slots: hit ratio {runs[-1]['hit_ratio']:.3f}")
    return {
        "model": trace.header.model,
        "decoded_tokens": int(decoded.sum()),
        "prompt_tokens": int((~decoded).sum()),
        "layers": architecture.expert_layers,
        "experts": architecture.num_local_experts,
        "chosen": architecture.num_experts_per_tok,
        "recall": {
            "this_norm": recall(trace, trace.guesses).tolist(),
            "next_norm": recall(trace, trace.guesses_next_norm).tolist(),
        },
        "compute_s": settings.compute_s,
        "bytes_per_s": settings.bytes_per_s,
        "runs": runs,
    }


def _factories(name: str, settings: Settings, layers: int) -> Any:
    if name == OPTIMUM:
        return [None] * layers
    if name != "fixed":
        return [POLICIES[name]] * layers
    if settings.choose_from is None:
        raise ValueError("the policy 'fixed' needs a trace that chooses its experts")
    return fixed_policies(settings.choose_from.uses().tolist())


def _hit_ratio(replay: LayerReplay, decoded: Any) -> float:
    return 1.0 - float(replay.missed[decoded].mean()) if decoded.any() else 0.0


def _reads(
    trace: Trace, replays: list[LayerReplay], guesses: int, settings: Settings
) -> dict[str, Any]:
    reads = reads_of(trace, replays, guesses, next_norm=settings.next_norm)
    demand, useful, wasted = reads.bytes_per_token()
    speeds = {
        n: reads.tokens_per_s(speed, settings.compute_s)
        for n, speed in settings.bytes_per_s.items()
    }
    return {
        "guesses": guesses,
        "total_bytes_per_token": demand + useful + wasted,
        "demand_bytes_per_token": demand,
        "useful_bytes_per_token": useful,
        "wasted_bytes_per_token": wasted,
        "covered": reads.covered,
        # JSON has no infinity.
        "tokens_per_s": {
            name: rate if np.isfinite(rate) else None for name, rate in speeds.items()
        },
    }
