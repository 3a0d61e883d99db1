"""What serves a model's experts on GPUs: slots there, a tier of page-locked RAM behind them, the
files behind that.
"""

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
from loader.cuda.experts.gpu_budget import PIECE_BYTES, GpuSlots, gpu_slots, split_layers
from loader.cuda.experts.gpu_reader import GpuReader
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.cuda.products.cuda_backend import CudaBackend
from loader.experts.buffers import Memory
from loader.experts.cache import ExpertCache
from loader.experts.fetcher import THREADS
from loader.experts.policy import Policy

TIER_STAGING = THREADS + 1
"""Experts that the tier holds at least: one for each thread that copies, and a guess that gave way.
"""


@dataclass(frozen=True)
class GpuExperts:
    """A cache, the trunk's backend, and for each layer the device with its slots and that device's
    backend. share: None where the CPU computes no experts.
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
        """Over `reader`, which the cache closes; the trunk, and `reserve_bytes` more, will be on
        the first of `devices`. slots: of each layer, instead of what `gpu_cache` holds.
        DoesNotFitError with the numbers if a budget, or what is free, is too small.
        """
        staging = staging_experts(artifact.architecture)
        # On the first as the trunk is: KV caches.
        trunk = [artifact.index.trunk.size_bytes + reserve_bytes] + [0] * (len(devices) - 1)
        if slots is None:
            places = gpu_slots(gpu_cache, devices, artifact, staging, trunk)
        else:
            check_slots(slots, artifact)
            places = _given(slots, devices, artifact)
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
            sizes = expert_bytes_by_layer(artifact)
            need = sum(count * size for count, size in zip(places.slots, sizes, strict=True))
            free = ", ".join(
                f"{device.name} has {device.memory()[0]} bytes free" for device in devices
            )
            raise DoesNotFitError(
                f"{artifact.folder}: slots for experts take {need} bytes, {free}",
                "give a smaller gpu_cache, or fewer slots",
            ) from None
        backends = {device.name: CudaBackend(device) for device in devices}
        share = None
        if cpu_share:
            speeds = Speeds.measured(devices[0], max(expert_bytes_by_layer(artifact)))
            share = CpuShare(cache, tier, speeds)
        of_layers = tuple(backends[device.name] for device in places.devices)
        return cls(cache, backends[devices[0].name], places.devices, of_layers, share)


def _given(slots: Sequence[int], devices: Sequence[Device], artifact: Artifact) -> GpuSlots:
    numbers = split_layers(expert_bytes_by_layer(artifact), [1] * len(devices))
    memory = [Memory(device.empty, PIECE_BYTES) for device in devices]
    return GpuSlots(
        tuple(devices[n] for n in numbers), tuple(slots), tuple(memory[n] for n in numbers)
    )
