"""The backend of layers on a GPU: packed weights by our kernels, 16-bit weights by torch."""

import torch
from torch import Tensor
from torch.nn import functional

from formats.expert import ExpertLayout, gate_and_up, sections
from formats.packing import AnyPacking, Packing
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import Products
from loader.lifetime.copies import Shared


class CudaBackend(Shared):
    """A `loader.arithmetic.backend.Backend`; all tensors except `index` are on `device`."""

    name = "cuda"
    for_gradients = None

    def __init__(self, device: Device) -> None:
        self.torch_device = device.torch_device
        self.products = Products(device)

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        acts = self.products.quantize(x.contiguous())
        return self.products.linear(acts, tiles, packing, rows, columns)

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
            result = self._unfused(layouts[expert], blobs[expert], x[token])
            out.index_add_(0, token, result * weights[token, rank, None])

    def _unfused(self, layout: ExpertLayout, blob: Tensor, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) · up(x)), float32 [T, hidden], for float32 x [T, hidden]."""
        gate_up, down = sections(layout, blob)
        rows = len(gate_up) * layout.gate_up.rows_each
        gate, up = gate_and_up(layout, self._product(gate_up, layout.gate_up, rows, x))
        inner = functional.silu(gate, inplace=True).mul_(up)
        return self._product(down, layout.down, layout.hidden, inner)

    def _product(self, stored: Tensor, packing: AnyPacking, rows: int, x: Tensor) -> Tensor:
        if isinstance(packing, Packing):
            return self.linear(stored, packing, rows, x.shape[1], x)
        # transformers computes such a model so: float32 sums, rounded to the weights' dtype.
        return functional.linear(x.to(stored.dtype), stored).float()
