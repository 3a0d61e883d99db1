"""Facts of the kernels' data and names that several callers need."""

from formats.expert import ExpertLayout
from formats.packing import Packing, blocks_of

ACT_BYTES = 80
"""Bytes of 64 quantized columns of one token (ActBlock in kernels/common.cuh)."""


def acts_shape(tokens: int, columns: int) -> tuple[int, int, int]:
    """Return the shape of acts, uint8: [tokens, blocks of 64 columns, 80], whole superblocks."""
    return tokens, 4 * blocks_of(columns), ACT_BYTES


def tile_packings(layout: ExpertLayout) -> tuple[Packing, Packing]:
    """Return the packings of gate and up, and of down. ValueError unless both are tiles."""
    if not isinstance(layout.gate_up, Packing) or not isinstance(layout.down, Packing):
        raise ValueError(f"experts of {layout.gate_up.name} and {layout.down.name}: expected tiles")
    return layout.gate_up, layout.down


def packing_suffix(packing: Packing) -> str:
    """Return the packing's part of kernel names, such as "q4_g64_s8"."""
    return packing.name.removeprefix("tile32-").replace("-", "_")
