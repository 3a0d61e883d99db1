"""The arithmetic behind the modules: one small interface, and its reference in torch."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from formats.errors import RecipeError
from formats.expert import ExpertLayout, split
from formats.packing import AnyPacking, Packing
from loader.arithmetic.torch_product import product

KERNELS = ("auto", "torch", "native")


class Backend(Protocol):
    """Products of packed weights, x and results float32, all tensors but `index` on `torch_device`."""

    name: str
    torch_device: torch.device

    @property
    def for_gradients(self) -> "Backend | None":
        """What computes a forward pass through which gradients go (loader/arithmetic/gradients.py):
        it does not round activations to int8. None where the backward is not implemented.
        """

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        """x [T, columns] · Wᵀ of the [rows, columns] matrix W in `tiles` (uint8 [tiles,
        tile_bytes]): [T, rows].
        """

    def experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Adds to `out` [T, hidden], for every expert in `blobs` (uint8 [n_bytes] each) in
        ascending order, weight · down(silu(gate(x)) · up(x)) of the tokens that chose it.

        x [T, hidden]; index int64 [T, k], on the CPU, and weights float32 [T, k] are the router's
        answer. With one token, `blobs` are all its experts. With more, a choice that is not in
        `blobs` adds nothing, so that consecutive calls over parts, in ascending order, give the
        bits of one call.
        """


class TorchBackend:
    """The reference: dequantizes what is used, then float32 products."""

    name = "torch"
    torch_device = torch.device("cpu")

    @property
    def for_gradients(self) -> "TorchBackend":
        return self

    def linear(
        self, tiles: Tensor, packing: AnyPacking, rows: int, columns: int, x: Tensor
    ) -> Tensor:
        """As `Backend.linear`; also of plain rows, [rows, columns] of the packing's dtype in the
        place of tiles.
        """
        return product(tiles, packing, rows, columns, x)

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
            layout = layouts[expert]
            gate, up, down = split(layout, blobs[expert])
            token, rank = torch.where(index == expert)
            mine = x[token]
            wide, narrow = layout.intermediate, layout.hidden
            inner = functional.silu(self.linear(gate, layout.gate_up, wide, narrow, mine))
            inner *= self.linear(up, layout.gate_up, wide, narrow, mine)
            result = self.linear(down, layout.down, narrow, wide, inner)
            out.index_add_(0, token, result * weights[token, rank, None])


def choose_backend(name: str) -> Backend:
    """The backend of `name`: "torch", "native" (RecipeError if it is not available here, saying
    why), or "auto": native where it is available, else torch (loader/arithmetic/kernels.py then
    warns, once, and says how to mend it).
    """
    if name not in KERNELS:
        raise RecipeError(f"kernels: {name!r} is unknown; known are {', '.join(KERNELS)}")
    if name == "torch":
        return TorchBackend()
    # Here, so that the torch backend needs no native library.
    from loader.arithmetic import kernels
    from loader.arithmetic.native_backend import NativeBackend

    if kernels.available():
        return NativeBackend()
    if name == "native":
        raise RecipeError(
            f"kernels: native ones are not available here: {kernels.describe()}",
            "use kernels auto or torch",
        )
    return TorchBackend()
