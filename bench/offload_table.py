"""The result of bench/offload.py as text: a table of medians, and the lines below its chart."""

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from formats.index import Index

IN_RAM = "all"
"""Label of the runs with all experts in RAM."""
MAPPED = "kernel's map"
"""Mode of plain mmap; the cache counts nothing there."""


def setting(index: Index, tokens: int, prompt: int, warm: int, rounds: int) -> Iterator[str]:
    """Yield lines for a chart: the model, and the tokens. warm: tokens that are not measured."""
    a = index.architecture
    expert_bytes = sum(layer.size_bytes for layer in index.layers)
    yield (
        f"{a.expert_layers} layers of {a.num_local_experts} experts, {a.hidden_size} ×"
        f" {a.intermediate_size}, recipe {index.recipe.name},"
        f" {expert_bytes / 1e9:.1f} GB, {index.source.name} weights."
    )
    yield (
        f"Batch 1, {tokens} tokens after a prompt of {prompt} and {warm} more tokens."
        f" Medians of {rounds} rounds of bench/offload.py."
    )


def processor() -> str:
    """Return the number of cores and the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else 'an unknown processor'}"


def bound_share(result: dict[str, Any], m: dict[str, float]) -> float:
    """Return the bound over a token's time in the run `m`; 1 if disk or memory is the limit."""
    disk_s = m["bytes_per_token"] / m["disk_gb_s"] / 1e9
    memory_s = result["token_bytes"] / m["stream_gb_s"] / 1e9
    return max(disk_s, memory_s) * m["tokens_per_s"]


def table(result: dict[str, Any]) -> str:
    """Return the runs as a table of medians over the rounds."""
    lines = [
        *result["setting"],
        f"{result['folder']}: experts {result['expert_bytes'] / 1e9:.2f} GB,"
        f" {result['token_bytes'] / 1e6:.0f} MB of weights per token"
        + ("" if result["limited"] else ", memory not limited (no rights to control groups)"),
        f"{'memory':>8} {'':13} {'tok/s':>7} {'MB/token':>9} {'misses':>7} {'x misses':>9} "
        f"{'hits':>6} {'busy':>6} {'x disk':>7} {'disk':>6} {'stream':>7} {'bound':>6}",
    ]
    for label, modes in result["runs"].items():
        for mode, found in modes.items():
            m = {key: statistics.median(run[key] for run in found) for key in found[0]}
            counted = f"{'':7} {'':9} {'':6} {'':6} {'':7}"
            if label != IN_RAM and mode != MAPPED:
                excess = m["bytes_per_token"] / max(m["missed_bytes_per_token"], 1)
                counted = (
                    f"{m['misses_per_token']:7.1f} {excess:9.2f} {m['hit_ratio']:6.3f}"
                    f" {m['busy_share']:6.2f} {m['busy_gb_s'] / m['disk_gb_s']:7.2f}"
                )
            lines.append(
                f"{label:>8} {mode:13} {m['tokens_per_s']:7.2f} {m['bytes_per_token'] / 1e6:9.1f}"
                f" {counted} {m['disk_gb_s']:6.2f} {m['stream_gb_s']:7.1f}"
                f" {bound_share(result, m):6.2f}"
            )
    return "\n".join(lines)
