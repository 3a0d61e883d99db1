"""Builds the experts of a model on GPUs: slots, RAM tier, reader and backends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from formats.reading.reader import ExpertReader
from loader.budget.expert_sizes import expert_bytes_by_layer, staging_experts
from loader.budget.ram import ram_budget
from loader.budget.slot_counts import check_slots, tier_counts
from loader.cuda.device.device import Device
from loader.cuda.experts.cpu_share import CpuShare, Speeds
from loader.cuda.experts.gpu_budget import GpuSlots, gpu_slots, split_layers
from loader.cuda.experts.gpu_reader import GpuReader
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.cuda.products.cuda_backend import CudaBackend
from loader.experts.cache import ExpertCache
from loader.experts.fetcher import THREADS
from loader.experts.policy import Policy

TIER_STAGING = THREADS + 1
"""Least number of experts in the tier: one for each reading thread, one interrupted prefetch."""


@dataclass(frozen=True)
class GpuExperts:
    """A model's expert cache on GPUs, and the backends of its layers.

    trunk: backend of the first GPU, which has the trunk. devices, backends: GPU of each layer's
    slots, and its backend. share: None if the CPU computes no experts.
    """

    cache: ExpertCache
    trunk: CudaBackend
    devices: tuple[Device, ...]
    backends: tuple[CudaBackend, ...]
    share: CpuShare | None

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        reader: ExpertReader,
        devices: Sequence[Device],
        *,
        gpu_cache: int | str,
        ram_cache: int | str,
        slots: Sequence[int] | None,
        policy: Callable[[], Policy],
        cpu_share: bool,
        reserve_bytes: int = 0,
    ) -> "GpuExperts":
        """Build the experts over `reader`, which the cache closes.

        slots: number of each layer, instead of a budget of `gpu_cache`. reserve_bytes: memory of
        the first GPU to leave free beside the trunk. Raises DoesNotFitError with the numbers if a
        budget or the free memory is too small.
        """
        staging = staging_experts(artifact.architecture)
        # The first GPU has the trunk and the KV cache.
        trunk_bytes = artifact.index.trunk.size_bytes + reserve_bytes
        if slots is None:
            trunks = [trunk_bytes] + [0] * (len(devices) - 1)
            places = gpu_slots(gpu_cache, devices, artifact, staging, trunks)
        else:
            check_slots(slots, artifact)
            numbers = split_layers(expert_bytes_by_layer(artifact), [1] * len(devices))
            places = GpuSlots.assign(numbers, slots, devices)
        budget = ram_budget(ram_cache, artifact, trunk_in_ram=False)
        counts = tier_counts(budget, artifact, TIER_STAGING + (staging if cpu_share else 0))
        tier = PinnedTier(reader, counts, devices[0].pin, devices[0].unpin)
        try:
            cache = ExpertCache(
                GpuReader(tier, places.devices),
                places.slots,
                staging=staging,
                policy=policy,
                memory=places.memory,
                tier=tier,
            )
        except torch.OutOfMemoryError:
            raise _does_not_fit(artifact, places, devices) from None
        share = None
        if cpu_share:
            speeds = Speeds.measured(devices[0], max(expert_bytes_by_layer(artifact)))
            share = CpuShare(cache, tier, speeds)
        backends = {device.name: CudaBackend(device) for device in devices}
        return cls(
            cache=cache,
            trunk=backends[devices[0].name],
            devices=places.devices,
            backends=tuple(backends[device.name] for device in places.devices),
            share=share,
        )


def _does_not_fit(
    artifact: Artifact, places: GpuSlots, devices: Sequence[Device]
) -> DoesNotFitError:
    sizes = expert_bytes_by_layer(artifact)
    need = sum(count * size for count, size in zip(places.slots, sizes, strict=True))
    free = ", ".join(f"{device.name} has {device.memory()[0]} bytes free" for device in devices)
    return DoesNotFitError(
        f"{artifact.folder}: slots for experts take {need} bytes, {free}",
        "give a smaller gpu_cache, or fewer slots",
    )
