"""Experts with plain rows on the CPU (docs/numerics.md, "Experts in 16 bits")."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from formats.expert import ExpertLayout, gate_and_up, sections
from formats.packing import AnyPacking, Packing
from loader.arithmetic import kernels
from loader.arithmetic.torch_product import product

TilesProduct = Callable[[Tensor, Tensor, str, int], Tensor]

_FEW_BESIDE_BF16 = 2
"""Tokens up to which the native kernel is faster than torch's bfloat16 product, on a processor with
bfloat16 instructions. Measured with 8x7B's sizes on two cores: 15 ms against 22 with one token, 34
against 19 with four.
"""


class PlainExperts:
    """Computes experts with plain rows in one or both sections; tiles use the native kernel."""

    def __init__(self, linear: TilesProduct = kernels.linear) -> None:
        """linear: multiplies a section in tiles, with the arguments of `kernels.linear`."""
        self._linear = linear
        self._has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()

    def run(self, layout: ExpertLayout, blob: Tensor, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) · up(x)); x and the result are float32 [T, hidden]."""
        gate_up, down = sections(layout, blob)
        # True in a bfloat16 model; the values between gate and down may then be rounded too.
        narrow = self._has_bf16 and torch.equal(x.bfloat16().float(), x)
        rows = len(gate_up) * layout.gate_up.rows_each
        gate, up = gate_and_up(layout, self._product(gate_up, layout.gate_up, rows, x, narrow))
        inner = functional.silu(gate, inplace=True).mul_(up)
        return self._product(down, layout.down, layout.hidden, inner, narrow)

    def _product(
        self, stored: Tensor, packing: AnyPacking, rows: int, x: Tensor, narrow: bool
    ) -> Tensor:
        """Return x · Wᵀ, float32 [T, rows].

        narrow: True allows bfloat16 products of many tokens with bfloat16 weights.
        """
        if isinstance(packing, Packing):
            return self._linear(x.contiguous(), stored, packing.name, rows)
        if stored.dtype is torch.bfloat16 and len(x) <= (
            _FEW_BESIDE_BF16 if narrow else kernels.MAX_BF16_TOKENS
        ):
            return kernels.linear_bf16(x.contiguous(), stored)
        if stored.dtype is torch.bfloat16 and narrow:
            return functional.linear(x.bfloat16(), stored).float()
        return product(stored, packing, rows, stored.shape[1], x)
