"""Refit by the native library, with or without error feedback: its function `moe_refit`."""

from ctypes import byref

import torch
from torch import Tensor

from converter.solvers.native.solver_library import Metric, library, raise_for
from converter.solvers.native.tile_place import TilePlace, weights_structure
from formats.native.abi import ISAS

_STATIC = 4
"""MOE_STATIC of converter/native/solver_api.h."""


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
    """Quantize the tiles of `place` and write their error sums to `errors`, float64 [tiles, 4].

    factor: float32 [blocks, width, width]. importance, diagonal, pairing: float32 [columns].
    low_rank: float32 [columns, rank]. damping: float64 [blocks]. Without `factor` there is no error
    feedback. converter/solvers/native/feedback_native.py describes the tensors.
    """
    columns = place.weight.shape[1]
    for name, numbers in (("importance", importance), ("diagonal", diagonal), ("pairing", pairing)):
        if numbers is not None:
            _check_columns(name, numbers, columns)
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
    weights = weights_structure(place.weight)
    tiles = place.tiles(errors)
    flags = _STATIC if static else 0
    status = library().moe_refit(byref(weights), byref(tiles), byref(metric), flags, ISAS[isa])
    raise_for(status, isa, tiles.non_finite)


def _check_columns(name: str, numbers: Tensor, columns: int) -> None:
    good = numbers.dtype == torch.float32 and numbers.shape == (columns,)
    if not (good and numbers.is_contiguous()):
        raise ValueError(
            f"{name} is {numbers.dtype} {tuple(numbers.shape)},"
            f" must be contiguous float32 [{columns}]"
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
