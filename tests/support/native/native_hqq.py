"""HQQ alone by the native library, with float32 scale and zero; tests compare it to the package."""

from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solvers.native.solver_library import library, raise_for
from converter.solvers.native.tile_place import check_weight, weights_structure
from formats.native.abi import ISAS

_ROUND_ZERO = 1


@dataclass(frozen=True)
class HqqGroups:
    """Result of HQQ: `w = (codes - zero)·scale`.

    codes: uint8 [rows, columns]; scale, zero: float32 [rows, groups].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def hqq(
    weight: Tensor, nbits: int, group_size: int, *, round_zero: bool = False, isa: str = "auto"
) -> HqqGroups:
    """Return HQQ's codes with float32 scale and zero, as the hqq package does for axis=1.

    weight: as in `quantize_tiles`. Groups run along the columns; the last one may be short. nbits:
    2, 3 or 4. group_size: 16, 32 or 64. round_zero: start from a rounded zero, as hqq's
    BaseQuantizeConfig does for 4 bits, at 1-2 % more error. Infinite or NaN weights give undefined
    codes.
    """
    check_weight(weight)
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(rows, groups)
    zero = torch.empty(rows, groups)
    flags = _ROUND_ZERO if round_zero else 0
    addresses = scale.data_ptr(), zero.data_ptr(), codes.data_ptr()
    status = library().moe_hqq(
        byref(weights_structure(weight)), nbits, group_size, flags, ISAS[isa], *addresses
    )
    raise_for(status, isa)
    return HqqGroups(codes, scale, zero)
