"""The experts of one token that the CPU computes where they lie in RAM, and the way of their sum to
the GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from loader.arithmetic.backend import Backend
from loader.cuda.decode.token_memory import TokenMemory, pinned
from loader.cuda.device.device import Device


class CpuPart:
    """Over a `TokenMemory` that is `for_cpu`; backend: the CPU's."""

    def __init__(self, device: Device, memory: TokenMemory, backend: Backend) -> None:
        self._device, self._memory, self._backend = device, memory, backend
        self._host = pinned(device, memory.sum.numel() * 4, self)
        self._there = memory.new(self._host.numel(), torch.uint8)
        self._sum, self._sum_there = (
            self._host.view(torch.float32)[None],
            self._there.view(torch.float32),
        )

    def add(
        self, blobs: dict[int, Tensor], layouts: dict[int, ExpertLayout], chosen: Sequence[int]
    ) -> None:
        """Adds the experts `blobs`, uint8 [n_bytes] in RAM, to the memory's `sum` after what was
        launched until now;
        layouts: of all experts; chosen: the token's, by rank. Waits for the CPU only.

        Once a layer: the copy of the sum before is over, since the host has waited for the router
        that came after it.
        """
        memory = self._memory
        ranks = [chosen.index(expert) for expert in blobs]
        index, weights = torch.tensor([list(blobs)]), memory.host_weights[ranks][None]
        x = memory.host_normed.float()[None]
        self._sum.zero_()
        self._backend.experts(blobs, layouts, x, index, weights, self._sum)
        self._device.copy(self._there, self._host, self._device.compute_stream())
        memory.sum.add_(self._sum_there)
