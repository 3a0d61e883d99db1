"""The bytes of one expert: section gate_up, then section down (docs/format.md, "Expert").

In tiles, gate and up alternate tile by tile. In rows, all of gate precedes all of up.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.errors import FormatError
from formats.index import Architecture
from formats.packing import TILE_ROWS, AnyPacking, Packing, packing_named

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATION = "silu"
"""Activation function of gate: an expert computes down · (silu(gate · x) * (up · x))."""


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of an expert: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    hidden: int
    intermediate: int
    gate_up: AnyPacking
    down: AnyPacking

    @classmethod
    def from_names(
        cls, architecture: Architecture, gate_up: str, down: str, where: str = "expert"
    ) -> "ExpertLayout":
        """Look up packings by name. Raises FormatError, with `where` in its message, if unknown."""
        return cls(
            architecture.hidden_size,
            architecture.intermediate_size,
            packing_named(gate_up, where),
            packing_named(down, where),
        )

    @property
    def is_tiled(self) -> bool:
        """True if both sections are tiles, as the fused kernels require."""
        return isinstance(self.gate_up, Packing) and isinstance(self.down, Packing)

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        """Shape of the section gate_up.

        Tiles: [2 · tiles, tile bytes]; tile 2i is gate's tile i, tile 2i + 1 is up's. Rows:
        [2 · intermediate, hidden]; gate's rows, then up's.
        """
        rows, columns = self.gate_up.stored_shape(self.intermediate, self.hidden)
        return 2 * rows, columns

    @property
    def down_shape(self) -> tuple[int, int]:
        """Shape of the section down: [tiles, tile bytes], or [hidden, intermediate]."""
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
        """Number of weights of the three matrices, without padding."""
        return 3 * self.hidden * self.intermediate


def sections(layout: ExpertLayout, blob: "Tensor") -> "tuple[Tensor, Tensor]":
    """View an expert's bytes (uint8 [n_bytes]) as the tensors `gate_up` and `down`.

    They have their packing's dtype and the shapes `gate_up_shape` and `down_shape`. Raises
    FormatError if the blob has another size.
    """
    if blob.shape != (layout.n_bytes,):
        raise FormatError(f"expert of {blob.numel()} bytes, its packings take {layout.n_bytes}")
    gate_up = blob[: layout.gate_up_bytes]
    down = blob[layout.gate_up_bytes :]
    return (
        gate_up.view(layout.gate_up.torch_dtype).view(layout.gate_up_shape),
        down.view(layout.down.torch_dtype).view(layout.down_shape),
    )


def split(layout: ExpertLayout, blob: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """View an expert's bytes as the stored matrices gate, up and down.

    Tiles are uint8 [tiles, tile bytes] and may have a stride between rows; rows are
    [rows, columns] of the packing's dtype. Errors as in `sections`.
    """
    gate_up, down = sections(layout, blob)
    if isinstance(layout.gate_up, Packing):
        gate, up = gate_up.view(-1, 2, gate_up.shape[1]).unbind(1)
    else:
        gate, up = gate_up.chunk(2)
    return gate, up, down


def gate_and_up(layout: ExpertLayout, products: "Tensor") -> "tuple[Tensor, Tensor]":
    """Split products with all rows of the section gate_up, [T, rows], into those of gate and of up.

    Returns two tensors [T, intermediate].
    """
    if not isinstance(layout.gate_up, Packing):
        gate, up = products.chunk(2, dim=1)
        return gate, up
    pairs = products.view(len(products), products.shape[1] // (2 * TILE_ROWS), 2, TILE_ROWS)
    gate, up = (part.flatten(1)[:, : layout.intermediate] for part in pairs.unbind(2))
    return gate, up
