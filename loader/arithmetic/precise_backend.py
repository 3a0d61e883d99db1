"""Native products with about 14 bits of each activation, for passes with gradients."""

import torch
from torch import Tensor
from torch.nn import functional

from formats.expert import ExpertLayout
from formats.packing import Packing
from loader.arithmetic import kernels
from loader.arithmetic.plain_experts import PlainExperts

_BLOCK = 64
"""Columns with one scale (docs/numerics.md, "One product")."""


class PreciseBackend:
    """A `Backend` with two native products for one: of the int8 activations, and of their rounding
    error.

    The error is a hundredth of that of one product, the time twice. Dequantizing the weights would
    take many times longer.
    """

    name = "native, two products"
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self._experts = PlainExperts(_linear)

    @property
    def for_gradients(self) -> "PreciseBackend":
        return self

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        return _linear(x, tiles, packing.name, rows)

    def experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        for expert in sorted(blobs):
            token, rank = torch.where(index == expert)
            result = self._experts.run(layouts[expert], blobs[expert], x[token])
            out.index_add_(0, token, result * weights[token, rank, None])


def _linear(x: Tensor, tiles: Tensor, packing: str, rows: int) -> Tensor:
    """Return `kernels.linear` of x plus that of its rounding error."""
    rounded = _rounded(x)
    result = kernels.linear(rounded, tiles, packing, rows)
    return result.add_(kernels.linear(x - rounded, tiles, packing, rows))


def _rounded(x: Tensor) -> Tensor:
    """Return x [T, columns] as the kernels round it."""
    tokens, columns = x.shape
    blocks = functional.pad(x, (0, -columns % _BLOCK)).view(tokens, -1, _BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    # The kernels treat blocks below 1e-30 as zero; both products drop such a block.
    codes = torch.where(scale > 1e-32, blocks / scale, 0.0).round_()
    return (codes * scale).view(tokens, -1)[:, :columns].contiguous()
