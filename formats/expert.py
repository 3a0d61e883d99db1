"""One expert's bytes: gate and up interleaved tile by tile, then down (docs/format.md, "Expert")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import FormatError
from formats.index import Architecture
from formats.packing import Packing, dequantize, packing_named, tiles_of, unpack


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of an expert of gate, up [intermediate, hidden] and down [hidden, intermediate]; all in bytes."""

    hidden: int
    intermediate: int
    gate_up: Packing
    down: Packing

    @classmethod
    def of(cls, architecture: Architecture, gate_up: str, down: str, where: str = "expert") -> "ExpertLayout":
        """The layout by packing names; FormatError naming `where` if one is unknown."""
        hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
        return cls(hidden, intermediate, packing_named(gate_up, where), packing_named(down, where))

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        """[2 · tiles, tile bytes]; tile 2i is gate's tile i, tile 2i + 1 is up's."""
        return 2 * tiles_of(self.intermediate), self.gate_up.tile_bytes(self.hidden)

    @property
    def down_shape(self) -> tuple[int, int]:
        """[tiles, tile bytes]."""
        return tiles_of(self.hidden), self.down.tile_bytes(self.intermediate)

    @property
    def gate_up_bytes(self) -> int:
        rows, columns = self.gate_up_shape
        return rows * columns

    @property
    def down_bytes(self) -> int:
        rows, columns = self.down_shape
        return rows * columns

    @property
    def n_bytes(self) -> int:
        return self.gate_up_bytes + self.down_bytes

    @property
    def n_weights(self) -> int:
        """Weights of the three projections, without padding."""
        return 3 * self.hidden * self.intermediate


def assemble(layout: ExpertLayout, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The expert's bytes, uint8 [n_bytes], of its three packed projections (uint8 [tiles, tile_bytes] each)."""
    gate_up = torch.stack([gate, up], dim=1).reshape(-1)
    return torch.cat([gate_up, down.reshape(-1)])


def split(layout: ExpertLayout, blob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of gate's, up's and down's tiles in `blob`, uint8 [n_bytes]; FormatError if it has another size."""
    if blob.shape != (layout.n_bytes,):
        raise FormatError(f"expert of {blob.numel()} bytes, its packings take {layout.n_bytes}")
    gate_up = blob[: layout.gate_up_bytes].view(layout.gate_up_shape[0] // 2, 2, layout.gate_up_shape[1])
    return gate_up[:, 0], gate_up[:, 1], blob[layout.gate_up_bytes :].view(layout.down_shape)


def dequantize_expert(layout: ExpertLayout, blob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up (float32 [intermediate, hidden]) and down (float32 [hidden, intermediate]) of an expert's bytes."""
    gate, up, down = split(layout, blob)

    def weights(tiles: Tensor, packing: Packing, rows: int, columns: int) -> Tensor:
        return dequantize(unpack(tiles, packing, rows, columns), packing.group_size)

    return (
        weights(gate, layout.gate_up, layout.intermediate, layout.hidden),
        weights(up, layout.gate_up, layout.intermediate, layout.hidden),
        weights(down, layout.down, layout.hidden, layout.intermediate),
    )
