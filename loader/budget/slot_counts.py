"""The number of experts that a budget holds: slots of each layer, or experts of a shared tier."""

from collections.abc import Sequence

from formats.artifact import Artifact
from formats.errors import DoesNotFitError, RecipeError
from formats.sizes import size_option
from loader.budget.expert_sizes import SizedExperts, expert_bytes_by_layer, staging_experts


def slots_by_layer(
    budget_bytes: int,
    artifact: SizedExperts,
    staging: int,
    *,
    all_in_place: bool,
    layers: slice = slice(None),
) -> tuple[int, ...]:
    """Return how many experts of each layer `budget_bytes` hold.

    Each layer gets the same number, at most all its experts. The rest of the budget gives one more
    slot to as many layers as it can, evenly spread over the model.

    staging: experts that need memory beside the slots, within the same budget.
    all_in_place: True if experts are used where their files are mapped; no staging is then needed
    once all experts fit.
    layers: the layers to count; the others get no slots.
    Raises DoesNotFitError if the budget does not even hold the staging area.
    """
    sizes = expert_bytes_by_layer(artifact)[layers]
    experts = artifact.architecture.num_local_experts
    if all_in_place and budget_bytes >= experts * sum(sizes):
        return (experts,) * len(sizes)
    left = budget_bytes - _checked_staging_bytes(budget_bytes, artifact, staging, sizes)
    slots = [min(left // sum(sizes), experts)] * len(sizes)
    left -= slots[0] * sum(sizes)
    if slots[0] < experts:
        for layer in _evenly_spread(len(sizes)):
            if sizes[layer] <= left:
                slots[layer] += 1
                left -= sizes[layer]
    return tuple(slots)


def tier_counts(budget_bytes: int, artifact: SizedExperts, staging: int) -> dict[int, int]:
    """Return how many experts of each size a tier of `budget_bytes` holds: size in bytes -> count.

    All layers share the tier; `expert_bytes_by_layer` gives the sizes. If not all experts fit, each
    size gets the same share of its experts, at least `staging`. Raises DoesNotFitError if the
    budget does not even hold `staging` experts of each size.
    """
    sizes = expert_bytes_by_layer(artifact)
    counts = {
        size: sizes.count(size) * artifact.architecture.num_local_experts
        for size in sorted(set(sizes))
    }
    total = sum(size * count for size, count in counts.items())
    if total <= budget_bytes:
        return counts
    least = _checked_staging_bytes(budget_bytes, artifact, staging, sizes)
    left = budget_bytes - least
    wanted = total - least
    return {size: staging + left * (count - staging) // wanted for size, count in counts.items()}


def slots_of_folder(artifact: Artifact, budget_bytes: int, io: str) -> tuple[int, ...]:
    """Return the slots of each layer of a folder that is read by `io`: "auto", "mmap" or "direct".

    Raises the errors of `slots_by_layer`.
    """
    all_in_place = io != "direct" and can_lie_in_place(artifact)
    return slots_by_layer(
        budget_bytes, artifact, staging_experts(artifact.architecture), all_in_place=all_in_place
    )


def can_lie_in_place(artifact: Artifact) -> bool:
    """True if experts can be used where their files are mapped: no expert is compressed."""
    return all(entry.codec == "none" for layer in artifact.index.layers for entry in layer.experts)


def check_slots(slots: Sequence[int], artifact: Artifact) -> None:
    """Raise RecipeError unless `slots` has one number for each layer, from 0 to all experts."""
    architecture = artifact.architecture
    experts = architecture.num_local_experts
    if not isinstance(slots, Sequence) or not all(isinstance(count, int) for count in slots):
        raise RecipeError(
            f"slots: {slots!r} is not a list of integers", "give one number for each layer"
        )
    if len(slots) != architecture.expert_layers:
        raise RecipeError(
            f"slots: {len(slots)} numbers for {architecture.expert_layers} layers",
            "give one number for each layer",
        )
    for layer, count in enumerate(slots):
        if not 0 <= count <= experts:
            raise RecipeError(f"slots: {count} for layer {layer}; expected 0 to {experts}")


def _checked_staging_bytes(
    budget_bytes: int, artifact: SizedExperts, staging: int, sizes: Sequence[int]
) -> int:
    need = staging * sum(set(sizes))
    if budget_bytes < need:
        raise DoesNotFitError(
            f"{artifact.folder}: the expert cache has {budget_bytes} bytes,"
            f" but a staging area of {staging} experts needs {need} bytes",
            f"free memory, or give a budget of at least {size_option(need)},"
            " or convert to fewer bits",
        )
    return need


def _evenly_spread(count: int) -> list[int]:
    """Return 0 ... count - 1 in an order in which every prefix is spread over the whole range."""
    bits = max(1, (count - 1).bit_length())
    reverse = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [number for number in reverse if number < count]
