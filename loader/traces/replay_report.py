"""Every combination of policies, slots and guesses over one trace, as plain values."""

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
    """What to combine.

    policies: names of POLICIES, or "fixed". slots: experts a layer (their mean, without
    equal_shares). guesses: 0 for no prefetch. bytes_per_s: named speeds at which misses come.
    compute_s: of a layer. choose_from: the trace that decides "fixed" and unequal shares.
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
    """Replays of `trace` for all `settings`, and for Belady's optimum over equal shares.

    Keys: model, tokens, layers; recall (by norm: [layers - 1][guesses]); runs: one for each policy
    and number of slots, with hit ratios, and reads for each number of guesses. ValueError for
    settings that the trace does not allow.
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
        raise ValueError("the policy 'fixed' needs a trace to choose from")
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
