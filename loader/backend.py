"""The arithmetic behind the modules: one small interface, and its reference in torch."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from formats.errors import RecipeError
from formats.expert import ExpertLayout, split
from formats.packing import TILE_ROWS, Packing, dequantize, unpack

KERNELS = ("auto", "torch", "native")

CHUNK_WEIGHTS = 1 << 22
"""Weights that are dequantized at a time: 16 MiB as float32, some 80 MiB with the steps in between."""


class Backend(Protocol):
    """Products of packed weights. All tensors on the CPU; x and results float32, weights as in docs/format.md."""

    name: str

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        """x [T, columns] · Wᵀ of the [rows, columns] matrix W in `tiles` (uint8 [tiles, tile_bytes]): [T, rows]."""

    def experts(
        self,
        blobs: dict[int, Tensor],
        layouts: dict[int, ExpertLayout],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Adds to `out` [T, hidden], for every expert in `blobs` (uint8 [n_bytes] each) in ascending order, weight ·
        down(silu(gate(x)) · up(x)) of the tokens that chose it.

        x [T, hidden]; index int64 [T, k] and weights float32 [T, k] are the router's answer. With one token, `blobs`
        are all its experts. With more, a choice that is not in `blobs` adds nothing, so that consecutive calls over
        parts, in ascending order, give the bits of one call.
        """


class TorchBackend:
    """The reference: dequantizes what is used, then float32 products."""

    name = "torch"

    def linear(self, tiles: Tensor, packing: Packing, rows: int, columns: int, x: Tensor) -> Tensor:
        step = max(1, CHUNK_WEIGHTS // (TILE_ROWS * columns))
        parts = []
        for begin in range(0, tiles.shape[0], step):
            part_rows = min(step * TILE_ROWS, rows - begin * TILE_ROWS)
            matrix = unpack(tiles[begin : begin + step], packing, part_rows, columns)
            parts.append(functional.linear(x, dequantize(matrix, packing.group_size)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

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
    """The backend of `name`: "torch", "native" (RecipeError if it is not available here, saying why), or "auto": native
    where it is available, else torch (loader/kernels.py then warns, once, and says how to mend it)."""
    if name not in KERNELS:
        raise RecipeError(f"kernels: {name!r} is unknown; known are {', '.join(KERNELS)}")
    if name == "torch":
        return TorchBackend()
    # Here, so that the torch backend needs no native library.
    from loader import kernels
    from loader.native_backend import NativeBackend

    if kernels.available():
        return NativeBackend()
    if name == "native":
        raise RecipeError(
            f"kernels: native ones are not available here: {kernels.describe()}", "use kernels auto or torch"
        )
    return TorchBackend()
