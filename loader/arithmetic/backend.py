"""The interface of products of packed weights, its reference in torch, and the choice of one."""

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
    """Products of packed weights.

    x and results are float32. All tensors except `index` are on `torch_device`.
    """

    name: str
    torch_device: torch.device

    @property
    def for_gradients(self) -> "Backend | None":
        """Backend for forward passes with gradients (loader/arithmetic/gradients.py).

        It does not round activations to int8. None if the backward pass is not implemented.
        """

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        """Return x [T, columns] · Wᵀ, [T, rows].

        tiles: the matrix W [rows, columns], packed, uint8 [tiles, tile_bytes].
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
        """Add weight · down(silu(gate(x)) · up(x)) to `out`, for each expert and its tokens.

        blobs: expert -> uint8 [n_bytes], computed in ascending order; all experts of the token if
        there is one token. x, out: [T, hidden]. index: the experts that the router chose, int64
        [T, k] on the CPU. weights: the router's weights, float32 [T, k].

        With several tokens, chosen experts that are not in `blobs` add nothing. So calls over
        consecutive parts of the experts, in ascending order, give the bits of one call.
        """


class TorchBackend:
    """The reference: dequantizes the weights that are used, then multiplies in float32."""

    name = "torch"
    torch_device = torch.device("cpu")

    @property
    def for_gradients(self) -> "TorchBackend":
        return self

    def linear(
        self, tiles: Tensor, packing: AnyPacking, rows: int, columns: int, x: Tensor
    ) -> Tensor:
        """Return x · Wᵀ (`Backend.linear`).

        tiles: packed, or plain rows [rows, columns] of the packing's dtype.
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
    """Return the backend of `name`: "torch", "native" or "auto".

    "auto" is native if the library is available, else torch, with one warning that says how to get
    the library. Raises RecipeError for other names, and for "native" without the library.
    """
    if name not in KERNELS:
        raise RecipeError(f"kernels: {name!r} is unknown; known are {', '.join(KERNELS)}")
    if name == "torch":
        return TorchBackend()
    # Imported here: the torch backend needs no native library.
    from loader.arithmetic import kernels
    from loader.arithmetic.native_backend import NativeBackend

    if kernels.available():
        return NativeBackend()
    if name == "native":
        raise RecipeError(
            f"kernels: the native library is not available: {kernels.describe()}",
            "use kernels auto or torch",
        )
    return TorchBackend()
