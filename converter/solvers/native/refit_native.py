"""Scales by search and least squares, with or without error feedback: moe_refit of the native
solver.
"""

from ctypes import byref

import torch
from torch import Tensor

from converter.solvers.native.solver_library import Metric, library, raise_for
from converter.solvers.native.tile_place import TilePlace, weights_structure
from formats.native.abi import ISAS

_STATIC = 4


def refit_tiles(
    place: TilePlace,
    errors: Tensor,
    *,
    importance: Tensor | None = None,
    factor: Tensor | None = None,
    order: Tensor | None = None,
    diagonal: Tensor | None = None,
    pairing: Tensor | None = None,
    low_rank: Tensor | None = None,
    damping: Tensor | None = None,
    static: bool = False,
    isa: str = "auto",
) -> None:
    """Quantizes the tiles of `place`; errors: fp64 [tiles, 4], written
    (converter/native/solver_api.h).

    factor: float32 [blocks, columns of a block, the same]. converter/solvers/native/feedback_native.py
    says what the tensors are.
    """
    columns = place.weight.shape[1]
    for name, numbers in (("importance", importance), ("diagonal", diagonal), ("pairing", pairing)):
        if numbers is not None and (
            numbers.dtype != torch.float32
            or numbers.shape != (columns,)
            or not numbers.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {numbers.dtype} {tuple(numbers.shape)}, must be contiguous float32 [{columns}]"
            )
    metric = Metric(
        factor=_address(factor),
        factor_block=0 if factor is None else factor.shape[-1],
        order=_address(order),
        importance=_address(importance),
        diagonal=_address(diagonal),
        pairing=_address(pairing),
        low_rank=_address(low_rank),
        rank=0 if low_rank is None else low_rank.shape[1],
        damping=_address(damping),
    )
    weights, tiles, flags = (
        weights_structure(place.weight),
        place.tiles(errors),
        _STATIC if static else 0,
    )
    status = library().moe_refit(byref(weights), byref(tiles), byref(metric), flags, ISAS[isa])
    raise_for(status, isa, tiles.non_finite)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
