"""One expert's bytes: gate and up, interleaved where they are tiles, then down (docs/format.md,
"Expert").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.index import Architecture
from formats.packing import TILE_ROWS, AnyPacking, Packing, packing_named

ACTIVATION = "silu"
"""What gate goes through before it is multiplied by up."""


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of an expert of gate, up [intermediate, hidden] and down [hidden, intermediate]; all in
    bytes.
    """

    hidden: int
    intermediate: int
    gate_up: AnyPacking
    down: AnyPacking

    @classmethod
    def of(
        cls, architecture: Architecture, gate_up: str, down: str, where: str = "expert"
    ) -> "ExpertLayout":
        """The layout by packing names; FormatError naming `where` if one is unknown."""
        hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
        return cls(hidden, intermediate, packing_named(gate_up, where), packing_named(down, where))

    @property
    def is_tiled(self) -> bool:
        """Whether all of it is tiles, as the fused kernels take it."""
        return isinstance(self.gate_up, Packing) and isinstance(self.down, Packing)

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        """Tiles: [2 · tiles, tile bytes], tile 2i is gate's tile i, tile 2i + 1 is up's. Rows: [2 ·
        intermediate, hidden], gate's rows, then up's.
        """
        rows, columns = self.gate_up.stored_shape(self.intermediate, self.hidden)
        return 2 * rows, columns

    @property
    def down_shape(self) -> tuple[int, int]:
        """[tiles, tile bytes], or [hidden, intermediate]."""
        return self.down.stored_shape(self.hidden, self.intermediate)

    @property
    def gate_up_bytes(self) -> int:
        return 2 * self.gate_up.matrix_bytes(self.intermediate, self.hidden)

    @property
    def down_bytes(self) -> int:
        return self.down.matrix_bytes(self.hidden, self.intermediate)

    @property
    def n_bytes(self) -> int:
        return self.gate_up_bytes + self.down_bytes

    @property
    def n_weights(self) -> int:
        """Weights of the three projections, without padding."""
        return 3 * self.hidden * self.intermediate


def assemble(layout: ExpertLayout, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The expert's bytes, uint8 [n_bytes], of its three projections as they are stored (`split`)."""
    tiled = isinstance(layout.gate_up, Packing)
    gate_up = torch.stack([gate, up], dim=1) if tiled else torch.stack([gate, up])
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in (gate_up, down)])


def sections(layout: ExpertLayout, blob: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the tensors `gate_up` and `down` in `blob`, uint8 [n_bytes]: of their packings'
    dtypes, [gate_up_shape] and [down_shape]. FormatError if the blob has another size.
    """
    if blob.shape != (layout.n_bytes,):
        raise FormatError(f"expert of {blob.numel()} bytes, its packings take {layout.n_bytes}")
    gate_up, down = blob[: layout.gate_up_bytes], blob[layout.gate_up_bytes :]
    return (
        gate_up.view(layout.gate_up.torch_dtype).view(layout.gate_up_shape),
        down.view(layout.down.torch_dtype).view(layout.down_shape),
    )


def split(layout: ExpertLayout, blob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of gate, up and down in `blob` as they are stored: uint8 [tiles, tile_bytes], whose
    rows may lie apart, or [rows, columns] of the packing's dtype. Errors as `sections`.
    """
    gate_up, down = sections(layout, blob)
    if isinstance(layout.gate_up, Packing):
        gate, up = gate_up.view(-1, 2, gate_up.shape[1]).unbind(1)
    else:
        gate, up = gate_up.chunk(2)
    return gate, up, down


def gate_and_up(layout: ExpertLayout, products: Tensor) -> tuple[Tensor, Tensor]:
    """Gate's and up's part, [T, intermediate] each, of products with all rows of the section
    `gate_up`, [T, rows].
    """
    if not isinstance(layout.gate_up, Packing):
        gate, up = products.chunk(2, dim=1)
        return gate, up
    pairs = products.view(len(products), products.shape[1] // (2 * TILE_ROWS), 2, TILE_ROWS)
    gate, up = (part.flatten(1)[:, : layout.intermediate] for part in pairs.unbind(2))
    return gate, up


def dequantize_expert(layout: ExpertLayout, blob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up (float32 [intermediate, hidden]) and down (float32 [hidden, intermediate]) of an
    expert's bytes.
    """
    gate, up, down = split(layout, blob)
    return (
        layout.gate_up.weights(gate, layout.intermediate, layout.hidden),
        layout.gate_up.weights(up, layout.intermediate, layout.hidden),
        layout.down.weights(down, layout.hidden, layout.intermediate),
    )
