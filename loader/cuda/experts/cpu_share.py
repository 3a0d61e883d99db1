"""Missed experts that the CPU computes where they lie in RAM, while the link brings the others."""

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
    """link_bytes_per_s: of copies of an expert to the GPU; cpu_bytes_per_s: at which the CPU
    computes with experts.
    """

    link_bytes_per_s: float
    cpu_bytes_per_s: float

    @classmethod
    def measured(cls, device: Device, expert_bytes: int) -> "Speeds":
        """Of this machine, within a second: the CPU's as fast as it reads its memory, which its
        kernels do.
        """
        return cls(link_bytes_per_s(device, expert_bytes), machine.memory_bytes_per_s())

    def split(self, experts: Sequence[int], n_bytes: int) -> tuple[list[int], list[int]]:
        """Those of `experts`, by rank and of `n_bytes` each, to copy, and those to compute on the
        CPU: each goes where it is done sooner after those before it; with equal times to the GPU,
        which then has it.
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
    """One token's experts: `on_gpu`, by rank, to be leased, and `on_cpu`, to be computed in RAM:
    uint8 [n_bytes].
    """

    on_gpu: list[int]
    on_cpu: dict[int, Tensor]


class CpuShare:
    """Splits each token's experts between the GPU of `cache` and the CPU, over the tier that both
    read.
    """

    def __init__(self, cache: ExpertCache, tier: PinnedTier, speeds: Speeds) -> None:
        self._cache, self._tier, self._speeds = cache, tier, speeds
        self._sizes = expert_bytes_by_layer(tier.artifact)

    @contextmanager
    def split(self, layer: int, experts: Sequence[int]) -> Iterator[Split]:
        """One token's `experts` of `layer`, by rank, around the lease. Only what the slots lack and
        the tier has goes to the CPU; afterwards that comes into the slots by and by.
        """
        missing = self._cache.missing(layer, experts)
        computed = self._speeds.split(missing, self._sizes[layer])[1]
        with ExitStack() as held:
            on_cpu = {}
            # A demand must find a buffer besides.
            for expert in computed[: self._tier.room(layer)]:
                if use := self._tier.find(layer, expert):
                    on_cpu[expert] = held.enter_context(use).blob
            yield Split([expert for expert in experts if expert not in on_cpu], on_cpu)
        for expert in on_cpu:
            self._cache.fill(layer, expert)
