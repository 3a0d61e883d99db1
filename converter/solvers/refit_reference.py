"""The solver `refit` in torch: range search, least squares, row scales and row gain.

It is the reference of the native code and replaces it if there is no native library.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solver_errors import UnfitWeightsError
from converter.solvers.reference_math import (
    FP16_MAX,
    check_finite,
    fp16_row_scales,
    quantization_error,
)
from converter.squared_error import SquaredError
from formats.packing import Packing
from formats.tiles import QuantizedMatrix, dequantize

# Candidates of the searches: parts of the group's range, and of the largest row scales.
_RANGE_PARTS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)
_LEAST_SQUARES_STEPS = 3
_DS_PARTS = tuple(1.0 - i / 24 for i in range(12))
_DM_PARTS = tuple(1.0 - i / 16 for i in range(6))
_MAX_GAIN = 1.5


def refit_rows(weight: Tensor, packing: Packing) -> tuple[QuantizedMatrix, SquaredError]:
    """Quantize `weight` [rows, columns] without calibration."""
    weight = checked_weights(weight, packing)
    groups = WeightGroups.split(weight, torch.ones(weight.shape[1]), packing)
    ds, dm = row_scales(groups, packing)
    s, m, codes, _ = under_row_scales(groups, *search_scales(groups, packing), ds, dm, packing)
    codes = codes.reshape(len(weight), -1)[:, : weight.shape[1]]
    matrix = QuantizedMatrix(
        codes.to(torch.uint8), s.to(torch.int16), m.to(torch.int16), ds.half(), dm.half()
    )
    matrix = with_gain(weight, matrix, packing, None)
    return matrix, quantization_error(weight, matrix, packing)


@dataclass(frozen=True)
class WeightGroups:
    """Weights in groups, and how much a squared error of each column counts.

    w: float32 [rows, groups, size]. importance: float32 [1, groups, size], 0 for padding.
    """

    w: Tensor
    importance: Tensor

    @classmethod
    def split(cls, weight: Tensor, importance: Tensor, packing: Packing) -> "WeightGroups":
        """Split weights [rows, columns] with importance [columns] into the packing's groups."""
        size = packing.group_size
        padding = -weight.shape[1] % size
        w = torch.nn.functional.pad(weight, (0, padding)).view(len(weight), -1, size)
        padded = torch.nn.functional.pad(importance, (0, padding)).view(1, -1, size)
        if w.shape[1] > 1:
            return cls(w, padded)
        # The fit of a single group depends only on the ratios, so the mean is scaled to 1.
        columns = torch.count_nonzero(padded, 2)[..., None].clamp(min=1)
        mean = padded.sum(2, keepdim=True) / columns
        return cls(w, padded / mean.clamp(min=1e-30))


def row_scales(groups: WeightGroups, packing: Packing) -> tuple[Tensor, Tensor]:
    """Return the row scales ds and dm with the smallest error among the candidates.

    float32 [rows] each, exact in fp16. A smaller row scale clips a few groups and rounds the others
    more finely. 8-bit packings take the largest.
    """
    scale, minimum = search_scales(groups, packing)
    ds = _row_scales_for(scale.clamp(min=0), packing.max_s)
    dm = _row_scales_for(
        minimum.clamp(min=0) if packing.min_m == 0 else minimum.abs(), packing.max_m
    )
    if packing.scale_bits == 8:
        return ds, dm
    best = torch.full_like(ds, torch.inf)
    largest_ds = ds
    largest_dm = dm
    for part in _DS_PARTS:
        candidate = (largest_ds * part).half().float()
        *_, error = under_row_scales(groups, scale, minimum, candidate, largest_dm, packing)
        ds = torch.where(error < best, candidate, ds)
        best = torch.minimum(error, best)
    for part in _DM_PARTS:
        candidate = (largest_dm * part).half().float()
        *_, error = under_row_scales(groups, scale, minimum, ds, candidate, packing)
        dm = torch.where(error < best, candidate, dm)
        best = torch.minimum(error, best)
    return ds, dm


def under_row_scales(
    groups: WeightGroups, scale: Tensor, minimum: Tensor, ds: Tensor, dm: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return S, M, codes and errors of groups under given row scales, all float32.

    S, M: [rows, groups]; S is rounded from `scale`, M minimizes the error under this S. codes:
    nearest codes [rows, groups, size]. errors: weighted squared errors [rows].
    """
    s = (scale / torch.where(ds > 0, ds, 1.0)[:, None]).round_().clamp_(0, packing.max_s)
    step = ds[:, None] * s
    codes = _codes(groups.w, step, minimum, packing.max_code)
    total = groups.importance.sum(2).clamp(min=1e-30)
    minimum = (groups.importance * (codes * step[:, :, None] - groups.w)).sum(2) / total
    m = (
        (minimum / torch.where(dm > 0, dm, 1.0)[:, None])
        .round_()
        .clamp_(packing.min_m, packing.max_m)
    )
    minimum = dm[:, None] * m
    codes = _codes(groups.w, step, minimum, packing.max_code)
    error = groups.importance * (codes * step[:, :, None] - minimum[:, :, None] - groups.w).square()
    return s, m, codes, error.sum((1, 2))


def _row_scales_for(values: Tensor, max_integer: int) -> Tensor:
    return fp16_row_scales(values.amax(1), max_integer).float()


def search_scales(groups: WeightGroups, packing: Packing) -> tuple[Tensor, Tensor]:
    """Return the scale and minimum with the smallest weighted error, float32 [rows, groups].

    Least squares refine each start of the range search.
    """
    w = groups.w
    count = groups.importance
    best_error = torch.full(w.shape[:2], torch.inf)
    best_scale, best_minimum = torch.zeros(w.shape[:2]), torch.zeros(w.shape[:2])
    total = count.sum(2)
    sum_w = (count * w).sum(2)
    for scale, minimum in _starts(w, packing):
        for _ in range(_LEAST_SQUARES_STEPS):
            codes = _codes(w, scale, minimum, packing.max_code)
            sum_q, sum_qq = (count * codes).sum(2), (count * codes.square()).sum(2)
            sum_qw = (count * codes * w).sum(2)
            spread = total * sum_qq - sum_q.square()
            fitted = (total * sum_qw - sum_q * sum_w) / spread
            good = (spread > 1e-4 * total.square()) & (fitted > 0)
            through = sum_qw / sum_qq
            slope = torch.where(good, fitted, scale)
            offset = (slope * sum_q - sum_w) / total
            if packing.min_m == 0:
                negative = (offset < 0) & (through > 0) & torch.isfinite(through)
                slope = torch.where(negative, through, slope)
                offset = torch.where(offset < 0, 0.0, offset)
            scale = slope
            minimum = offset
        codes = _codes(w, scale, minimum, packing.max_code)
        error = (count * (codes * scale[:, :, None] - minimum[:, :, None] - w).square()).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _starts(w: Tensor, packing: Packing) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scale and minimum for the group's range, then for smaller parts around its middle."""
    low, high = w.amin(2), w.amax(2)
    middle = (low + high) / 2
    if packing.min_m == 0:
        # M is unsigned, so a group's minimum is not above zero.
        low = low.clamp(max=0)
        middle = torch.zeros_like(low)
    for part in _RANGE_PARTS:
        yield (high - low) * (part / packing.max_code), -(middle + (low - middle) * part)


def _codes(w: Tensor, scale: Tensor, minimum: Tensor, max_code: int) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((w + minimum[:, :, None]) * inverse[:, :, None]).round_().clamp_(0, max_code)


def with_gain(
    weight: Tensor, matrix: QuantizedMatrix, packing: Packing, hessian: Tensor | None
) -> QuantizedMatrix:
    """Multiply both row scales by ⟨w,w⟩/⟨w,w'⟩, because least squares makes rows too small.

    The products are in the metric of `hessian`, or plain if it is None.
    """
    restored = dequantize(matrix, packing.group_size)
    metric = weight if hessian is None else _times(weight, hessian)
    gain = (weight * metric).sum(1) / (restored * metric).sum(1)
    gain = torch.where((gain > 1 / _MAX_GAIN) & (gain < _MAX_GAIN), gain, 1.0)
    largest = (torch.maximum(matrix.ds.float(), matrix.dm.float()) * gain).amax()
    if float(largest) > FP16_MAX:
        return matrix
    ds, dm = ((scale.float() * gain).half() for scale in (matrix.ds, matrix.dm))
    return QuantizedMatrix(matrix.codes, matrix.s, matrix.m, ds, dm)


def _times(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return weight · H for a block-diagonal H, [rows, columns]."""
    rows, columns = weight.shape
    blocks, width, _ = hessian.shape
    padded = torch.nn.functional.pad(weight, (0, blocks * width - columns)).view(
        rows, blocks, width
    )
    return torch.bmm(padded.transpose(0, 1), hessian).transpose(0, 1).reshape(rows, -1)[:, :columns]


def checked_weights(weight: Tensor, packing: Packing) -> Tensor:
    """Return the weights as float32; raise UnfitWeightsError if the packing cannot hold them.

    Beyond the largest scales, squared errors would overflow without notice.
    """
    check_finite(weight)
    weight = weight.float()
    largest = float(weight.abs().max())
    if largest > FP16_MAX * (packing.max_s * packing.max_code + packing.max_m):
        raise UnfitWeightsError(f"weights up to {largest:g} do not fit under scales in fp16")
    return weight
