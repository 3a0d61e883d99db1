"""Memory budgets: what `auto` means, how many experts a budget holds."""

import math
from pathlib import Path

import psutil

from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from formats.sizes import parse_size

RESERVE_BYTES = 512 << 20
RESERVE_SHARE = 16
"""`auto` leaves free 512 MiB or 1/16 of the machine's memory, whichever is more: for the KV cache, the activations,
the reference arithmetic's dequantized weights (under 200 MB), and whoever else runs here."""

_CGROUP = Path("/sys/fs/cgroup")


def expert_bytes_by_layer(artifact: Artifact) -> list[int]:
    """The bytes in memory of the largest expert of each layer."""
    experts = range(artifact.architecture.num_local_experts)
    layers = range(artifact.architecture.num_hidden_layers)
    return [max(artifact.layout(layer, expert).n_bytes for expert in experts) for layer in layers]


def ram_budget(ram_cache: int | str, artifact: Artifact) -> int:
    """The bytes that experts may take in RAM. `ram_cache` is a size for `parse_size`, or "auto": the memory that is
    available now, less the trunk that is loaded next, less a reserve (RESERVE_BYTES, RESERVE_SHARE)."""
    if ram_cache != "auto":
        return parse_size(ram_cache, "ram_cache")
    available, total = available_memory()
    return max(0, available - artifact.index.trunk.size_bytes - max(RESERVE_BYTES, total // RESERVE_SHARE))


def slots_per_layer(budget_bytes: int, artifact: Artifact) -> int:
    """How many experts of each layer `budget_bytes` hold, at most all.

    DoesNotFitError if not even one token's experts fit.
    """
    architecture = artifact.architecture
    slot_bytes = sum(expert_bytes_by_layer(artifact))
    slots = min(budget_bytes // slot_bytes, architecture.num_local_experts)
    if slots < architecture.num_experts_per_tok:
        least = slot_bytes * architecture.num_experts_per_tok
        need = f"{architecture.num_experts_per_tok} experts in each of {architecture.num_hidden_layers} layers"
        raise DoesNotFitError(
            f"{artifact.folder}: the expert cache of {budget_bytes} bytes must hold {need}: {least} bytes",
            f"free memory, or give a budget of at least {math.ceil(least / 2**20)}MiB, or convert to fewer bits",
        )
    return slots


def available_memory() -> tuple[int, int]:
    """(available, total) bytes: the machine's, or the control group's (a container's) where that is less."""
    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _number(_CGROUP / limit_name), _number(_CGROUP / used_name)
        # Without a limit, version 1 reports nearly 2^63. Page cache counts as used: too careful, never too bold.
        if limit is not None and used is not None and limit < total:
            available, total = min(available, max(0, limit - used)), limit
    return available, total


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
