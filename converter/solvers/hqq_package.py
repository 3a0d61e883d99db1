"""The solver `hqq-package`: HQQ by the hqq package, in torch. Tests compare the native `hqq` to it.

The package gives float scales; they are rounded to the packing's, then codes are chosen again.
"""

import importlib.metadata

import torch
from torch import Tensor

from converter.solvers.reference_math import check_finite, fp16_row_scales, quantization_error
from converter.squared_error import SquaredError
from formats.packing import Packing
from formats.tiles import QuantizedMatrix, pack


class PackageHqq:
    """`hqq` by the hqq package: 2 to 7 million weights per second and core."""

    # Measured: hqq keeps a dozen float32 copies.
    bytes_a_weight = 48

    def __init__(self) -> None:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("hqq", "torch")]
        self.version = ", ".join(versions)

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """Implement `Solver.solve`."""
        check_finite(weight)
        matrix, error = quantize_rows(weight, packing)
        tiles.copy_(pack(matrix, packing))
        return error


def quantize_rows(weight: Tensor, packing: Packing) -> tuple[QuantizedMatrix, SquaredError]:
    """Quantize rows by the hqq package and round the scales to the packing's.

    weight: [rows, columns] of any float dtype. Raises UnfitWeightsError if a row's scale exceeds
    fp16.
    """
    weight = weight.float()
    scale, minimum = _hqq(weight, packing.nbits, packing.group_size)
    matrix = round_scales(weight, scale, minimum, packing)
    return matrix, quantization_error(weight, matrix, packing)


def round_scales(
    weight: Tensor, scale: Tensor, minimum: Tensor, packing: Packing
) -> QuantizedMatrix:
    """Round scales and minima to S and M under row scales, then choose the codes.

    weight ≈ scale·q − minimum; scale, minimum: float32 [rows, groups]. docs/numerics.md states
    every step.
    """
    rows, columns = weight.shape
    ds, s = _under_row_scale(scale, 0, packing.max_s)
    dm, m = _under_row_scale(minimum, packing.min_m, packing.max_m)
    step = ds.float()[:, None] * s
    offset = dm.float()[:, None] * m
    padded = _groups(weight, packing.group_size)
    codes = ((padded + offset[:, :, None]) / step[:, :, None]).round_()
    codes = torch.where(step[:, :, None] > 0, codes, 0.0).clamp_(0, packing.max_code)
    return QuantizedMatrix(
        codes.to(torch.uint8).view(rows, -1)[:, :columns],
        s.to(torch.int16),
        m.to(torch.int16),
        ds,
        dm,
    )


def _under_row_scale(values: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """Return fp16 row scales [rows] and integers, float32 [rows, groups]: scale · integer ≈ value.

    lowest, highest: range of the integers.
    """
    largest = values.clamp(min=0).amax(1) if lowest == 0 else values.abs().amax(1)
    row_scale = fp16_row_scales(largest, highest)
    divisor = row_scale.float()
    divisor = torch.where(divisor > 0, divisor, 1.0)
    return row_scale, (values / divisor[:, None]).round_().clamp_(lowest, highest)


def _hqq(weight: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return HQQ's scale and scale·zero, float32 [rows, groups]; groups run along the columns.

    The last group is shorter if the columns do not fill it.
    """
    columns = weight.shape[1]
    whole = columns - columns % group_size
    parts = [(weight[:, :whole], group_size)] if whole else []
    if whole < columns:
        parts.append((weight[:, whole:], columns - whole))
    solved = [_hqq_groups(part.contiguous(), nbits, size) for part, size in parts]
    scales = torch.cat([scale for scale, _ in solved], 1)
    minima = torch.cat([minimum for _, minimum in solved], 1)
    return scales, minima


def _hqq_groups(weight: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    from hqq.core.quantize import Quantizer

    rows = weight.shape[0]
    codes, meta = Quantizer.quantize(
        weight,
        nbits=nbits,
        group_size=group_size,
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    scale = meta["scale"].view(rows, -1)
    zero = meta["zero"].view(rows, -1)
    codes = codes.view(rows, -1, group_size)
    # hqq gives a group of a narrow range the scale 1. As the largest of its row, this scale would
    # round the others to 0. A group with a single code needs no scale: the minimum holds its value.
    lowest, highest = codes.amin(2), codes.amax(2)
    single = lowest == highest
    minimum = torch.where(single, scale * (zero - lowest), scale * zero)
    return torch.where(single, 0.0, scale), minimum


def _groups(weight: Tensor, group_size: int) -> Tensor:
    """Return the weights in groups, [rows, groups, group_size], padded with zeros."""
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % group_size)).view(rows, -1, group_size)
