"""What fits where with a GPU, and the tokens per second to expect. Computed; nothing of it was
measured on a GPU.
"""

import math
from dataclasses import dataclass

from formats.errors import DoesNotFitError
from loader.budget.expert_sizes import (
    SizedExperts,
    expert_bytes_by_layer,
    staging_bytes,
    staging_experts,
)
from loader.budget.slot_counts import slots_by_layer, tier_counts
from loader.cuda.experts.stack import TIER_STAGING
from loader.planning.memory_plan import PROCESS_BYTES, ModelSizes, Plan
from loader.traces.tier_misses import TierMisses

CONTEXT_BYTES = 512 << 20
"""GPU memory for CUDA's context, kernels and what torch's allocator rounds up. Assumed: users of
PyTorch report 300 to 400 MB of context where kernels are loaded when first used (pytorch/pytorch,
issues 107667 and 109888).
"""

CUDA_PROCESS_BYTES = 512 << 20
"""RAM for CUDA's libraries, beside PROCESS_BYTES. Assumed."""

GPU_EFFICIENCY = 0.5
"""The low end of the expected speed, as a share of what link, GPU memory and disk allow where
nothing overlaps.
Assumed: for kernels below a data sheet's bandwidth, for launches, and for the wait for each layer's
router.
"""


@dataclass(frozen=True)
class GpuMachine:
    """Bytes a second: of copies from page-locked RAM to the GPU, of the GPU's memory, and of where
    experts come from that are not in RAM (None if all are there).
    """

    link_bytes_per_s: float
    gpu_memory_bytes_per_s: float
    disk_bytes_per_s: float | None


@dataclass(frozen=True)
class GpuPart:
    """What takes how many bytes of the GPU's memory, as `Plan` says it of RAM.

    cache_bytes: what experts get (`gpu_cache` of `from_pretrained`). miss_ratio: of the experts
    that a token needs, those that are not on the GPU; copied_bytes_per_token: theirs, over the
    link.
    """

    vram_bytes: int
    trunk_bytes: int
    kv_bytes: int
    prefix_bytes: int
    workspace_bytes: int
    cache_bytes: int
    aside_bytes: int
    slot_bytes: int
    slots: tuple[int, ...]
    miss_ratio: float
    copied_bytes_per_token: float


@dataclass(frozen=True)
class GpuPlan(Plan):
    """A plan with a GPU: the trunk, the KV cache and activations are there, RAM has experts only.
    miss_ratio: of the experts that a token needs, those that are neither on the GPU nor in RAM.
    slots: RAM's, which are one pool for all layers, those on their way included, as if it were
    divided evenly. tokens_per_s: with GPU_EFFICIENCY.
    """

    gpu: GpuPart


def plan_gpu(
    sizes: ModelSizes,
    machine: GpuMachine,
    vram_bytes: int,
    ram_bytes: int | None,
    *,
    context: int,
    prompt: int,
    tier_misses: TierMisses,
) -> GpuPlan:
    """The plan for `vram_bytes` of a GPU and a process of `ram_bytes`; None takes as much as all
    experts need.

    DoesNotFitError with the least budget where the GPU or the RAM has not even room for the experts
    on their way. ValueError if the disk is needed and its speed is not known.
    """
    experts, chosen = sizes.experts, sizes.architecture.num_experts_per_tok
    process = PROCESS_BYTES + CUDA_PROCESS_BYTES
    ram_bytes = process + sizes.all_experts if ram_bytes is None else ram_bytes
    gpu_cache, ram_cache = _gpu_cache(sizes, vram_bytes, context, prompt), ram_bytes - process
    if ram_cache < (least := staging_bytes(experts, TIER_STAGING)):
        raise _does_not_fit(
            "RAM", ram_bytes, {"the process": process, "experts on their way": least}
        )
    gpu_slots = slots_by_layer(
        gpu_cache, experts, staging_experts(sizes.architecture), all_in_place=False
    )
    ram_slots = _tier_slots(ram_cache, experts)
    in_memory = expert_bytes_by_layer(experts)
    missed = [
        tier_misses(layer, *there)
        for layer, there in enumerate(zip(gpu_slots, ram_slots, strict=True))
    ]
    copied = chosen * sum(
        on_gpu * size for (on_gpu, _), size in zip(missed, in_memory, strict=True)
    )
    read = chosen * sum(both * size for (_, both), size in zip(missed, sizes.stored, strict=True))
    if read and machine.disk_bytes_per_s is None:
        raise ValueError(f"{read} bytes a token come from a disk of unknown speed")
    seconds = (
        copied / machine.link_bytes_per_s,
        # What is copied is written there, and then read as the rest.
        (sizes.used_per_token(context) + copied) / machine.gpu_memory_bytes_per_s,
        read / (machine.disk_bytes_per_s or math.inf),
    )
    return GpuPlan(
        ram_bytes=ram_bytes,
        trunk_bytes=0,
        kv_bytes=0,
        prefix_bytes=0,
        workspace_bytes=process,
        cache_bytes=ram_cache,
        aside_bytes=0,
        slot_bytes=sum(n * size for n, size in zip(ram_slots, in_memory, strict=True)),
        slots=ram_slots,
        miss_ratio=sum(both for _, both in missed) / len(missed),
        read_bytes_per_token=read,
        tokens_per_s=(GPU_EFFICIENCY / sum(seconds), 1 / max(seconds)),
        gpu=GpuPart(
            vram_bytes=vram_bytes,
            trunk_bytes=sizes.trunk,
            kv_bytes=sizes.kv_per_position * context,
            prefix_bytes=sizes.prefix,
            workspace_bytes=CONTEXT_BYTES + sizes.activations(prompt),
            cache_bytes=gpu_cache,
            aside_bytes=sizes.staging_bytes,
            slot_bytes=sum(n * size for n, size in zip(gpu_slots, in_memory, strict=True)),
            slots=gpu_slots,
            miss_ratio=sum(on_gpu for on_gpu, _ in missed) / len(missed),
            copied_bytes_per_token=copied,
        ),
    )


def _gpu_cache(sizes: ModelSizes, vram_bytes: int, context: int, prompt: int) -> int:
    """What experts get of the GPU's memory."""
    kv, workspace = sizes.kv_per_position * context, CONTEXT_BYTES + sizes.activations(prompt)
    cache = vram_bytes - sizes.trunk - kv - sizes.prefix - workspace
    if cache < sizes.staging_bytes:
        parts = {
            "the trunk": sizes.trunk,
            f"{context} positions of KV cache": kv,
            "prefix caches": sizes.prefix,
        }
        parts |= {
            "CUDA's context and activations": workspace,
            "experts on their way": sizes.staging_bytes,
        }
        raise _does_not_fit("GPU memory", vram_bytes, parts)
    return cache


def _tier_slots(cache_bytes: int, experts: SizedExperts) -> tuple[int, ...]:
    """The tier's experts of each size, divided evenly among the layers with that size."""
    by_layer = expert_bytes_by_layer(experts)
    slots = [0] * len(by_layer)
    for size, count in tier_counts(cache_bytes, experts, TIER_STAGING).items():
        layers = [layer for layer, each in enumerate(by_layer) if each == size]
        for place, layer in enumerate(layers):
            slots[layer] = count * (place + 1) // len(layers) - count * place // len(layers)
    return tuple(slots)


def _does_not_fit(what: str, given: int, parts: dict[str, int]) -> DoesNotFitError:
    least = sum(parts.values())
    named = ", ".join(f"{name} {n_bytes}" for name, n_bytes in parts.items())
    return DoesNotFitError(
        f"{what} of {given} bytes: what must be there takes {least} in all: {named}",
        f"give at least {math.ceil(least / 2**20)}MiB, or a shorter context or prompt, or convert to fewer bits",
    )
