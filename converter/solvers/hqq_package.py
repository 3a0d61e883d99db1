"""The hqq package's solver, then super-scales, then codes chosen again for the rounded scales: the
oracle of ours.
"""

import importlib.metadata

import torch
from torch import Tensor

from converter.solvers.reference_math import check_finite, fp16_row_scales, quantization_error
from converter.squared_error import SquaredError
from formats.packing import Packing, QuantizedMatrix, pack


class PackageHqq:
    """Quantizes by the hqq package, in torch: 2 to 7 million weights a second and core."""

    # Measured: hqq keeps a dozen float32 copies.
    bytes_a_weight = 48

    def __init__(self) -> None:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("hqq", "torch")]
        self.version = ", ".join(versions)

    def solve(self, weight: Tensor, packing: Packing, tiles: Tensor) -> SquaredError:
        """As `Solver.solve`."""
        check_finite(weight)
        matrix, error = quantize_rows(weight, packing)
        tiles.copy_(pack(matrix, packing))
        return error


def quantize_rows(weight: Tensor, packing: Packing) -> tuple[QuantizedMatrix, SquaredError]:
    """`weight` [rows, columns] of any float dtype, quantized by the hqq package and rounded to the
    packing's scales.

    Raises UnfitWeightsError if a row's scale does not fit into fp16.
    """
    weight = weight.float()
    scale, minimum = _hqq(weight, packing.nbits, packing.group_size)
    matrix = round_scales(weight, scale, minimum, packing)
    return matrix, quantization_error(weight, matrix, packing)


def round_scales(
    weight: Tensor, scale: Tensor, minimum: Tensor, packing: Packing
) -> QuantizedMatrix:
    """`weight` ≈ scale·q − minimum (float32 [rows, groups] each) with both rounded to S and M under
    row scales.

    The codes are chosen after the rounding. docs/numerics.md states every step.
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


def _under_row_scale(values: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """(fp16 row scales, integers as float32 [rows, groups]) with scale · integer ≈ values."""
    largest = values.clamp(min=0).amax(1) if least == 0 else values.abs().amax(1)
    half = fp16_row_scales(largest, most)
    divisor = half.float()
    divisor = torch.where(divisor > 0, divisor, 1.0)
    return half, (values / divisor[:, None]).round_().clamp_(least, most)


def _hqq(weight: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scale and scale·zero, float32 [rows, groups], of the hqq package's solver, groups along the
    columns.

    Columns that do not fill a group make a shorter last group.
    """
    columns = weight.shape[1]
    whole = columns - columns % group_size
    parts = [(weight[:, :whole], group_size)] if whole else []
    if whole < columns:
        parts.append((weight[:, whole:], columns - whole))
    solved = [_hqq_groups(part.contiguous(), nbits, size) for part, size in parts]
    return torch.cat([scale for scale, _ in solved], 1), torch.cat(
        [minimum for _, minimum in solved], 1
    )


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
    scale, zero = meta["scale"].view(rows, -1), meta["zero"].view(rows, -1)
    codes = codes.view(rows, -1, group_size)
    # A group with a single code needs no scale: hqq gives those of a narrow range the scale 1,
    # which as the largest of its row would leave nothing for the others. Its value goes into the
    # minimum.
    lowest, highest = codes.amin(2), codes.amax(2)
    single = lowest == highest
    return torch.where(single, 0.0, scale), torch.where(
        single, scale * (zero - lowest), scale * zero
    )


def _groups(weight: Tensor, group_size: int) -> Tensor:
    """[rows, groups, group_size], padded with zeros."""
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % group_size)).view(rows, -1, group_size)
