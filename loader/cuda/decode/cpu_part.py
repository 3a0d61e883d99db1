"""The part of a token's experts that the CPU computes from RAM, and its way to the GPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from loader.arithmetic.backend import Backend
from loader.cuda.decode.token_memory import TokenMemory, pinned
from loader.cuda.device.device import Device


class CpuPart:
    """Computes experts with the CPU's `backend` and adds them to the token's sum on the GPU.

    memory: made with `for_cpu`.
    """

    def __init__(self, device: Device, memory: TokenMemory, backend: Backend) -> None:
        self._device = device
        self._memory = memory
        self._backend = backend
        self._host = pinned(device, memory.sum.numel() * 4, self)
        self._gpu = memory.new(self._host.numel(), torch.uint8)
        self._host_sum = self._host.view(torch.float32)[None]
        self._gpu_sum = self._gpu.view(torch.float32)

    def add(
        self, blobs: dict[int, Tensor], layouts: dict[int, ExpertLayout], chosen: Sequence[int]
    ) -> None:
        """Add the experts `blobs`, uint8 [n_bytes] in RAM, to the memory's `sum`.

        layouts: layout of each expert of the layer. chosen: the token's experts by rank. Waits for
        the CPU only. Call it once for each layer: the layer's wait for its router shows that the
        previous copy of the sum is over.
        """
        memory = self._memory
        ranks = [chosen.index(expert) for expert in blobs]
        index = torch.tensor([list(blobs)])
        weights = memory.host_weights[ranks][None]
        x = memory.host_normed.float()[None]
        self._host_sum.zero_()
        self._backend.experts(blobs, layouts, x, index, weights, self._host_sum)
        self._device.copy(self._gpu, self._host, self._device.compute_stream())
        memory.sum.add_(self._gpu_sum)
