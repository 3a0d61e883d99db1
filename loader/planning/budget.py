"""Memory budgets: what `auto` means, how many experts a budget holds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import psutil

from formats.artifact import Artifact
from formats.errors import DoesNotFitError, RecipeError
from formats.expert import ExpertLayout
from formats.files.control_group import within_group
from formats.index import Architecture
from formats.sizes import parse_size

RESERVE_BYTES = 512 << 20
RESERVE_SHARE = 16
"""`auto` leaves free 512 MiB or 1/16 of the machine's memory, whichever is more: for the KV cache,
the activations, the reference arithmetic's dequantized weights (under 200 MB), and whoever else
runs here.
"""


class SizedExperts(Protocol):
    """A converted folder (`Artifact`), or what a recipe would make of a checkpoint."""

    @property
    def folder(self) -> Path:
        """Its name, for messages."""

    @property
    def architecture(self) -> Architecture:
        """The model's numbers."""

    def layout(self, layer: int, expert: int) -> ExpertLayout:
        """The layout of an expert in memory."""


def experts_aside(architecture: Architecture) -> int:
    """How many experts are outside of the slots at most: those of one token, two at least."""
    return max(2, architecture.num_experts_per_tok)


def expert_bytes_by_layer(artifact: SizedExperts) -> list[int]:
    """The bytes in memory of the largest expert of each layer."""
    experts = range(artifact.architecture.num_local_experts)
    layers = range(artifact.architecture.expert_layers)
    return [max(artifact.layout(layer, expert).n_bytes for expert in experts) for layer in layers]


def ram_budget(
    ram_cache: int | str, artifact: Artifact, *, trunk_in_ram: bool = True, reserve_bytes: int = 0
) -> int:
    """The bytes that experts may take in RAM. `ram_cache` is a size for `parse_size`, or "auto":
    the memory that is available now, less the trunk that is loaded next if it stays there, less a
    reserve (RESERVE_BYTES, RESERVE_SHARE) and `reserve_bytes`.
    """
    if ram_cache != "auto":
        return parse_size(ram_cache, "ram_cache")
    available, total = available_memory()
    trunk = artifact.index.trunk.size_bytes if trunk_in_ram else 0
    return max(0, available - trunk - max(RESERVE_BYTES, total // RESERVE_SHARE) - reserve_bytes)


def aside_bytes(artifact: SizedExperts, aside: int) -> int:
    """What `aside` experts outside of the slots take: as many of each size that there is."""
    return aside * sum(set(expert_bytes_by_layer(artifact)))


def slots_by_layer(
    budget_bytes: int,
    artifact: SizedExperts,
    aside: int,
    *,
    all_in_place: bool,
    layers: slice = slice(None),
) -> tuple[int, ...]:
    """How many experts of each layer (of each of `layers`) `budget_bytes` hold, at most all: the
    same number in each layer, and one more in as many layers, evenly spread, as the rest of the
    budget allows.

    `aside` more are on their way beside the slots, which the budget holds too; unless all experts
    fit it and are used where they lie (`all_in_place`). DoesNotFitError if not even those on their
    way fit.
    """
    sizes = expert_bytes_by_layer(artifact)[layers]
    most = artifact.architecture.num_local_experts
    if all_in_place and budget_bytes >= most * sum(sizes):
        return (most,) * len(sizes)
    left = budget_bytes - _checked_aside(budget_bytes, artifact, aside, sizes)
    slots = [min(left // sum(sizes), most)] * len(sizes)
    left -= slots[0] * sum(sizes)
    if slots[0] < most:
        for layer in _evenly_spread(len(sizes)):
            if sizes[layer] <= left:
                slots[layer] += 1
                left -= sizes[layer]
    return tuple(slots)


def tier_counts(budget_bytes: int, artifact: SizedExperts, aside: int) -> dict[int, int]:
    """How many experts of each size (`expert_bytes_by_layer`) a tier of `budget_bytes` holds for
    all layers together: all, or of each size the same share, `aside` at least. DoesNotFitError if
    not even those fit.
    """
    sizes = expert_bytes_by_layer(artifact)
    counts = {
        size: sizes.count(size) * artifact.architecture.num_local_experts
        for size in sorted(set(sizes))
    }
    if (total := sum(size * count for size, count in counts.items())) <= budget_bytes:
        return counts
    least = _checked_aside(budget_bytes, artifact, aside, sizes)
    left, wanted = budget_bytes - least, total - least
    return {size: aside + left * (count - aside) // wanted for size, count in counts.items()}


def _checked_aside(
    budget_bytes: int, artifact: SizedExperts, aside: int, sizes: Sequence[int]
) -> int:
    need = aside * sum(set(sizes))
    if budget_bytes < need:
        raise DoesNotFitError(
            f"{artifact.folder}: the expert cache of {budget_bytes} bytes must hold {aside} experts on their way: "
            f"{need} bytes",
            f"free memory, or give a budget of at least {math.ceil(need / 2**20)}MiB, or convert to fewer bits",
        )
    return need


def slots_of_folder(artifact: Artifact, budget_bytes: int, io: str) -> tuple[int, ...]:
    """The slots of a folder that is read by `io` ("auto", "mmap" or "direct"). Errors as
    `slots_by_layer`.
    """
    all_in_place = io != "direct" and can_lie_in_place(artifact)
    return slots_by_layer(
        budget_bytes, artifact, experts_aside(artifact.architecture), all_in_place=all_in_place
    )


def can_lie_in_place(artifact: Artifact) -> bool:
    """Whether experts can be used where their files are mapped."""
    return all(entry.codec == "none" for layer in artifact.index.layers for entry in layer.experts)


def check_slots(slots: Sequence[int], artifact: Artifact) -> None:
    """RecipeError unless `slots` has a possible number for each layer."""
    architecture = artifact.architecture
    most = architecture.num_local_experts
    if not isinstance(slots, Sequence) or not all(isinstance(count, int) for count in slots):
        raise RecipeError(
            f"slots: {slots!r} is no list of numbers", "give one number for each layer"
        )
    if len(slots) != architecture.expert_layers:
        raise RecipeError(f"slots: {len(slots)} numbers for {architecture.expert_layers} layers")
    for layer, count in enumerate(slots):
        if not 0 <= count <= most:
            raise RecipeError(f"slots: {count} for layer {layer}; expected is 0 to {most}")


def _evenly_spread(count: int) -> list[int]:
    """0 ... count - 1, so that each beginning of the list is spread over the whole range."""
    bits = max(1, (count - 1).bit_length())
    reverse = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [number for number in reverse if number < count]


def available_memory() -> tuple[int, int]:
    """(available, total) bytes: the machine's, or the control group's (a container's) where that is
    less.
    """
    memory = psutil.virtual_memory()
    return within_group(memory.available, memory.total)
