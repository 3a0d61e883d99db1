"""The backend of layers on a GPU: products of packed weights by our kernels, of plain ones by
torch.
"""

import torch
from torch import Tensor
from torch.nn import functional

from formats.expert import ExpertLayout, gate_and_up, sections
from formats.packing import AnyPacking, Packing
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import Products
from loader.lifetime.copies import Shared


class CudaBackend(Shared):
    """A `loader.arithmetic.backend.Backend` whose tensors, but for `index`, lie on `device`."""

    name = "cuda"
    for_gradients = None

    def __init__(self, device: Device) -> None:
        self.torch_device = device.torch_device
        self.products = Products(device)

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        return self.products.linear(
            self.products.quantize(x.contiguous()), tiles, packing, rows, columns
        )

    def experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        if all(layouts[expert].is_tiled for expert in blobs):
            self.products.add_experts(blobs, layouts, x, index, weights, out)
            return
        for expert in sorted(blobs):
            token, rank = (part.to(x.device) for part in torch.where(index == expert))
            result = self._plain(layouts[expert], blobs[expert], x[token])
            out.index_add_(0, token, result * weights[token, rank, None])

    def _plain(self, layout: ExpertLayout, blob: Tensor, x: Tensor) -> Tensor:
        """down(silu(gate(x)) · up(x)), float32 [T, hidden], of x, float32 [T, hidden]."""
        gate_up, down = sections(layout, blob)
        rows = len(gate_up) * layout.gate_up.rows_each
        gate, up = gate_and_up(layout, self._product(gate_up, layout.gate_up, rows, x))
        inner = functional.silu(gate, inplace=True).mul_(up)
        return self._product(down, layout.down, layout.hidden, inner)

    def _product(self, stored: Tensor, packing: AnyPacking, rows: int, x: Tensor) -> Tensor:
        if isinstance(packing, Packing):
            return self.linear(stored, packing, rows, x.shape[1], x)
        # As transformers computes such a model: summed in float32, the result rounded to the
        # weights' dtype.
        return functional.linear(x.to(stored.dtype), stored).float()
