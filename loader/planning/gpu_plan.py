"""Plans with a GPU: what fits where, and the expected tokens per second.

The formulas were not checked against measurements on a GPU.
"""

import math
from dataclasses import dataclass

from formats.errors import DoesNotFitError
from formats.model_memory import PROCESS_BYTES
from formats.sizes import size_option
from loader.budget.expert_sizes import (
    SizedExperts,
    expert_bytes_by_layer,
    staging_bytes,
    staging_experts,
)
from loader.budget.slot_counts import slots_by_layer, tier_counts
from loader.cuda.experts.stack import TIER_STAGING
from loader.planning.memory_plan import ModelSizes, Plan
from loader.traces.tier_misses import TierMisses

CONTEXT_BYTES = 512 << 20
"""GPU memory for CUDA's context, kernels and rounding of torch's allocator. Assumed: PyTorch users
report contexts of 300 to 400 MB with lazily loaded kernels (pytorch/pytorch, issues 107667 and
109888).
"""

CUDA_PROCESS_BYTES = 512 << 20
"""RAM for CUDA's libraries, in addition to PROCESS_BYTES. Assumed."""

GPU_EFFICIENCY = 0.5
"""Low end of the expected speed, as a share of the speed that link, GPU memory and disk allow
without overlap. Assumed, to cover kernels below peak bandwidth, launches, and the wait for each
layer's router.
"""


@dataclass(frozen=True)
class GpuMachine:
    """Speeds in bytes per second.

    link: copies from page-locked RAM to the GPU. gpu_memory: reads of the GPU's memory. disk: reads
    of experts that are not in RAM; None if all are in RAM.
    """

    link_bytes_per_s: float
    gpu_memory_bytes_per_s: float
    disk_bytes_per_s: float | None


@dataclass(frozen=True)
class GpuPart:
    """Use of the GPU's memory in bytes; `Plan` has the same fields for RAM.

    cache_bytes: for experts (`gpu_cache` of `from_pretrained`). miss_ratio: share of the requested
    experts that are not on the GPU. copied_bytes_per_token: bytes of these over the link.
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
    """A plan with a GPU, which holds the trunk, KV cache and activations; RAM holds only experts.

    miss_ratio: share of the requested experts that are neither on the GPU nor in RAM.
    slots: experts in RAM, staging included, as if the pool of all layers were divided evenly.
    tokens_per_s: low end with GPU_EFFICIENCY.
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
    """Return the plan for a GPU with `vram_bytes` and a process with `ram_bytes`.

    ram_bytes: None takes as much as all experts need. context: positions of the KV cache, of which
    `prompt` come at once. tier_misses: miss ratios of GPU and RAM (loader/traces/tier_misses.py).

    Raises DoesNotFitError with the smallest budget if GPU or RAM have no room for experts on their
    way; ValueError if the disk is needed and its speed is unknown.
    """
    experts, chosen = sizes.experts, sizes.architecture.num_experts_per_tok
    process = PROCESS_BYTES + CUDA_PROCESS_BYTES
    ram_bytes = process + sizes.all_experts if ram_bytes is None else ram_bytes
    gpu_cache = _gpu_cache(sizes, vram_bytes, context, prompt)
    ram_cache = ram_bytes - process
    least = staging_bytes(experts, TIER_STAGING)
    if ram_cache < least:
        raise _does_not_fit(
            "RAM", ram_bytes, {"the process": process, "experts on their way": least}
        )
    gpu_slots = slots_by_layer(
        gpu_cache, experts, staging_experts(sizes.architecture), all_in_place=False
    )
    ram_slots = _tier_slots(ram_cache, experts)
    in_memory = expert_bytes_by_layer(experts)
    missed = [
        tier_misses(layer, *slots)
        for layer, slots in enumerate(zip(gpu_slots, ram_slots, strict=True))
    ]
    copied = chosen * sum(
        on_gpu * size for (on_gpu, _), size in zip(missed, in_memory, strict=True)
    )
    read = chosen * sum(both * size for (_, both), size in zip(missed, sizes.stored, strict=True))
    if read and machine.disk_bytes_per_s is None:
        raise ValueError(f"{read} bytes a token come from a disk of unknown speed")
    seconds = (
        copied / machine.link_bytes_per_s,
        # A copied expert is written to GPU memory and then read like the others.
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
    """Return the GPU memory that is left for experts, in bytes."""
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
    """Return the tier's experts of each layer: those of each size divided evenly."""
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
        f"{what} of {given} bytes is too small; it must hold {least} bytes: {named}",
        f"give at least {size_option(least)}, or a shorter context or prompt,"
        " or convert to fewer bits",
    )
