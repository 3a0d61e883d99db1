"""The backend over the native kernels (loader/kernels.py)."""

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from formats.packing import Packing
from loader import kernels


class NativeBackend:
    """Products straight from packed bytes; activations are rounded to int8 in groups (docs/numerics.md)."""

    name = "native"

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        return kernels.linear(x.contiguous(), tiles, packing.name, rows)

    def experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        x, index, weights = x.contiguous(), index.contiguous(), weights.contiguous()
        first = layouts[next(iter(blobs))]
        # One token's experts are always all in `blobs` (the smallest cache holds them).
        if x.shape[0] == 1 and all(layouts[expert] == first for expert in blobs):
            # A table for each call: its blobs may be evicted after it, and other threads run calls of this layer.
            table = kernels.ExpertTable(
                len(layouts), first.hidden, first.intermediate, first.gate_up.name, first.down.name
            )
            for expert, blob in blobs.items():
                table.set(expert, blob)
            table.run(x, index, weights, out)
            return
        calls = []
        for expert in sorted(blobs):
            token, rank = torch.where(index == expert)
            layout = layouts[expert]
            names = layout.gate_up.name, layout.down.name
            calls.append(kernels.ExpertCall(blobs[expert], *names, token.to(torch.int32), weights[token, rank]))
        kernels.experts(x, calls, first.intermediate, out)
