"""Random tiles and experts."""

import torch
from expert_bytes import assemble

from formats.expert import ExpertLayout
from formats.packing import packing_named

PACKING = packing_named("tile32-q4-g64-s8")


def random_tiles(rows, columns):
    tiles = torch.randint(0, 256, (rows // 32, PACKING.tile_bytes(columns)), dtype=torch.uint8)
    tiles[:, :128] = torch.full((64,), 2e-5, dtype=torch.float16).view(torch.uint8)
    return tiles


def blob_of(layout: ExpertLayout, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=rng) / columns**0.5).to(dtype)

    wide, narrow, dtypes = (
        layout.intermediate,
        layout.hidden,
        (layout.gate_up.torch_dtype, layout.down.torch_dtype),
    )
    return assemble(
        layout,
        matrix(wide, narrow, dtypes[0]),
        matrix(wide, narrow, dtypes[0]),
        matrix(narrow, wide, dtypes[1]),
    )
