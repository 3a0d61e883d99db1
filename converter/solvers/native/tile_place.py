"""The tiles that a call of the native solver writes, and where; checked before the call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solvers.native.solver_library import Tiles, Weights, packing_id
from formats.native.abi import DTYPES
from formats.packing import Packing, tile_packing_named, tiles_of


@dataclass(frozen=True)
class TilePlace:
    """Tiles tile_begin..tile_end (exclusive) of a matrix, `stride_bytes` apart in `out`."""

    packing: Packing
    weight: Tensor
    out: Tensor
    tile_begin: int
    tile_end: int
    stride_bytes: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.tile_end - self.tile_begin

    def tiles(self, errors: Tensor) -> Tiles:
        """Return the structure for the library; it writes each tile's sums to `errors`."""
        return Tiles(
            begin=self.tile_begin,
            end=self.tile_end,
            out=self.out.data_ptr(),
            stride_bytes=self.stride_bytes,
            errors=errors.data_ptr(),
            packing=packing_id(self.packing.name),
        )


def check_place(
    weight: Tensor,
    packing: str,
    out: Tensor,
    tile_begin: int,
    tile_end: int | None,
    stride_tiles: int,
) -> TilePlace:
    """Return the checked place; ValueError for tensors of a wrong dtype, shape or layout.

    out: tile `tile_begin` is at its front and each next tile `stride_tiles` tiles later.
    """
    layout = tile_packing_named(packing)
    check_weight(weight)
    rows, columns = weight.shape
    tile_bytes = layout.tile_bytes(columns)
    end = tiles_of(rows) if tile_end is None else tile_end
    if not 0 <= tile_begin <= end <= tiles_of(rows):
        raise ValueError(f"tiles {tile_begin}..{end} of a matrix of {tiles_of(rows)} tiles")
    if stride_tiles < 1:
        raise ValueError(f"stride_tiles is {stride_tiles}, must be 1 or more")
    count = end - tile_begin
    needed = ((count - 1) * stride_tiles + 1) * tile_bytes if count else 0
    if (
        out.dtype != torch.uint8
        or out.dim() != 1
        or not out.is_contiguous()
        or out.device.type != "cpu"
    ):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device},"
            " must be contiguous uint8 [n] on the CPU"
        )
    if out.numel() < needed:
        raise ValueError(
            f"out has {out.numel()} bytes, {count} tiles of {layout.name} need {needed}"
        )
    return TilePlace(layout, weight, out, tile_begin, end, stride_tiles * tile_bytes)


def check_weight(weight: Tensor) -> None:
    """Raise ValueError for a matrix that the library cannot read."""
    if weight.dtype not in DTYPES or weight.dim() != 2 or weight.device.type != "cpu":
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device},"
            " must be float32, bfloat16 or float16 [rows, columns] on the CPU"
        )
    if not weight.is_contiguous() or weight.numel() == 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be contiguous and not empty")


def weights_structure(weight: Tensor) -> Weights:
    """Return a checked matrix for the library. It holds an address: keep the tensor alive."""
    rows, columns = weight.shape
    return Weights(weight.data_ptr(), rows, columns, DTYPES[weight.dtype])


def flat_tiles(tiles: Tensor) -> tuple[Tensor, int]:
    """Return the bytes of a strided view from its first to its last tile, and its stride in tiles.

    tiles: uint8 [tiles, tile_bytes]. The bytes are uint8 [n].
    """
    size = (len(tiles) - 1) * tiles.stride(0) + tiles.shape[1]
    return tiles.as_strided((size,), (1,)), tiles.stride(0) // tiles.shape[1]
