"""Computes some of a token's missed experts on the CPU while the link copies the others."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from loader.arithmetic import machine
from loader.budget.expert_sizes import expert_bytes_by_layer
from loader.cuda.device.device import Device
from loader.cuda.device.speeds import link_bytes_per_s
from loader.cuda.experts.pinned_tier import PinnedTier
from loader.experts.cache import ExpertCache


@dataclass(frozen=True)
class Speeds:
    """Speeds of this machine, in bytes of experts per second.

    link_bytes_per_s: copies to the GPU. cpu_bytes_per_s: computation on the CPU.
    """

    link_bytes_per_s: float
    cpu_bytes_per_s: float

    @classmethod
    def measured(cls, device: Device, expert_bytes: int) -> "Speeds":
        """Measure both within a second.

        The CPU's speed is that of reading its memory, which limits its kernels.
        """
        return cls(link_bytes_per_s(device, expert_bytes), machine.memory_bytes_per_s())

    def split(self, experts: Sequence[int], n_bytes: int) -> tuple[list[int], list[int]]:
        """Split `experts`, by rank and of `n_bytes` each, into those to copy and those to compute.

        Each expert goes where it finishes first after those before it; a tie goes to the GPU.
        """
        copied: list[int] = []
        computed: list[int] = []
        for expert in experts:
            copy_s = (len(copied) + 1) * n_bytes / self.link_bytes_per_s
            cpu_s = (len(computed) + 1) * n_bytes / self.cpu_bytes_per_s
            (copied if copy_s <= cpu_s else computed).append(expert)
        return copied, computed


@dataclass(frozen=True)
class Split:
    """One token's experts in one layer.

    on_gpu: experts to lease from the cache, by rank. on_cpu: bytes in RAM, uint8 [n_bytes], of the
    experts to compute on the CPU.
    """

    on_gpu: list[int]
    on_cpu: dict[int, Tensor]


class CpuShare:
    """Splits each token's experts between a GPU and the CPU.

    cache: the GPU's slots. tier: the RAM tier that the slots are filled from.
    """

    def __init__(self, cache: ExpertCache, tier: PinnedTier, speeds: Speeds) -> None:
        self._cache = cache
        self._tier = tier
        self._speeds = speeds
        self._sizes = expert_bytes_by_layer(tier.artifact)

    @contextmanager
    def split(self, layer: int, experts: Sequence[int]) -> Iterator[Split]:
        """Split one token's `experts` of `layer`, by rank. Enter it before the lease.

        The CPU gets only experts that the slots miss and the tier has. They are read into slots in
        the background afterwards.
        """
        missing = self._cache.missing(layer, experts)
        computed = self._speeds.split(missing, self._sizes[layer])[1]
        with ExitStack() as held:
            on_cpu = {}
            # A demand read needs a buffer of the tier as well.
            for expert in computed[: self._tier.room(layer)]:
                if use := self._tier.find(layer, expert):
                    on_cpu[expert] = held.enter_context(use).blob
            yield Split([expert for expert in experts if expert not in on_cpu], on_cpu)
        for expert in on_cpu:
            self._cache.fill(layer, expert)
