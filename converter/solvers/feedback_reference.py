"""The solvers `refit` and `feedback` in torch: range search and least squares, row scales, error
feedback, row gain.

The oracle of the native code, and what runs where that is not built. Error feedback is GPTQ's
(Frantar et al. 2022, section 3): columns are rounded from left to right, and what a column is off
by is made up for by the columns to its right. A group is fitted when its turn comes, to what its
weights are by then: on tiny-mixtral KL .0071 against .0088 for groups that were all fitted before
(2 bits, bench/quality.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.solvers.hqq_package import FP16_MAX, FP16_TINY
from converter.solvers.protocol import NonFiniteWeightsError, SquaredError, UnfitWeightsError
from formats.errors import SourceError
from formats.packing import Packing, QuantizedMatrix, dequantize

DAMPING = 0.01
"""Of the mean diagonal (docs/quality.md)."""

_SHRINKS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)
_LEAST_SQUARES_STEPS = 3
_DS_PARTS = tuple(1.0 - i / 24 for i in range(12))
_DM_PARTS = tuple(1.0 - i / 16 for i in range(6))
_MAX_GAIN = 1.5
_ROOM = 1.06
"""Row scales are fitted to the weights as they are; the errors carried to a group widen it."""


class SingularStatisticsError(SourceError, ValueError):
    """Second moments that are not finite, or zero, so that no factorization exists."""

    def __init__(self) -> None:
        super().__init__("the input statistics are singular", "use more or other calibration text")


def factorize(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper triangular with UᵀU = (H + damping · mean diagonal)⁻¹: float32, of the shape of
    hessian [..., n, n].

    A block that is zero as a whole gets the identity: nothing reaches its columns. Raises
    SingularStatisticsError.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise SingularStatisticsError
    blocks = hessian.reshape(-1, *hessian.shape[-2:])
    if not float(blocks.abs().amax()):
        raise SingularStatisticsError
    result = torch.empty_like(blocks)
    for block, factor in zip(blocks, result, strict=True):
        damped = block.double()
        mean = damped.diagonal().mean().clamp(min=1e-30)
        damped = damped + torch.eye(len(block), dtype=torch.float64) * (damping * mean)
        # H = R Rᵀ with R upper (Cholesky of the flipped matrix), so U = R⁻¹ and the inverse of H is
        # never formed.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info):
            raise SingularStatisticsError
        root = lower.flip(0, 1)
        factor.copy_(
            torch.linalg.solve_triangular(
                root, torch.eye(len(block), dtype=torch.float64), upper=True
            )
        )
    return result.view_as(hessian)


def refit_rows(weight: Tensor, packing: Packing) -> tuple[QuantizedMatrix, SquaredError]:
    """`weight` [rows, columns] without calibration: scales by search and least squares, gain
    corrected.
    """
    weight = _checked(weight, packing)
    groups = _Groups.of(weight, torch.ones(weight.shape[1]), packing)
    ds, dm = _row_scales(groups, packing)
    s, m, codes, _ = _under_row_scales(groups, *_search(groups, packing), ds, dm, packing)
    codes = codes.reshape(len(weight), -1)[:, : weight.shape[1]]
    matrix = QuantizedMatrix(
        codes.to(torch.uint8), s.to(torch.int16), m.to(torch.int16), ds.half(), dm.half()
    )
    matrix = _with_gain(weight, matrix, packing, None)
    return matrix, _error(weight, matrix, packing)


def feedback_rows(
    weight: Tensor, packing: Packing, hessian: Tensor, factor: Tensor
) -> tuple[QuantizedMatrix, SquaredError]:
    """`weight` [rows, columns] with error feedback.

    hessian, factor: float32 [blocks, width, width] over the columns, as in InputStatistics and from
    `factorize`. The row scales are found before; each group's S and M when its turn comes, from
    what its weights are by then.
    """
    weight = _checked(weight, packing)
    rows, columns = weight.shape
    blocks, width, _ = hessian.shape
    size = packing.group_size
    # What a column's error costs after the columns to its right have made up for it: 1 / U²
    # (GPTQ's loss).
    importance = factor.diagonal(dim1=1, dim2=2).reshape(-1)[:columns].square().reciprocal()
    found = _row_scales(_Groups.of(weight, importance, packing), packing)
    ds, dm = ((scale * _ROOM).clamp(max=FP16_MAX).half().float() for scale in found)
    codes = torch.empty(rows, columns)
    n_groups = -(-columns // size)
    s, m = torch.empty(rows, n_groups), torch.empty(rows, n_groups)
    for block in range(blocks):
        first = block * width
        n = min(width, columns - first)
        left = weight[:, first : first + n].clone()
        unit = factor[block, :n, :n] / factor[block, :n, :n].diagonal()[:, None]
        for begin in range(0, n, size):
            end, at, g = min(begin + size, n), first + begin, (first + begin) // size
            groups = _Groups.of(left[:, begin:end], importance[at : first + end], packing)
            found_s, found_m, _, _ = _under_row_scales(
                groups, *_search(groups, packing), ds, dm, packing
            )
            s[:, g], m[:, g] = found_s[:, 0], found_m[:, 0]
            step, offset = ds * s[:, g], dm * m[:, g]
            inverse = torch.where(step > 0, 1 / step, 0.0)
            errors = torch.empty(rows, end - begin)
            for c in range(begin, end):
                code = ((left[:, c] + offset) * inverse).round_().clamp_(0, packing.max_code)
                error = left[:, c] - (code * step - offset)
                codes[:, first + c], errors[:, c - begin] = code, error
                left[:, c + 1 : end].addr_(error, unit[c, c + 1 : end], alpha=-1)
            left[:, end:].addmm_(errors, unit[begin:end, end:], alpha=-1)
    matrix = QuantizedMatrix(
        codes.to(torch.uint8), s.to(torch.int16), m.to(torch.int16), ds.half(), dm.half()
    )
    matrix = _with_gain(weight, matrix, packing, hessian)
    return matrix, _error(weight, matrix, packing)


@dataclass(frozen=True)
class _Groups:
    """Weights [rows, groups, size] and what an error of each column counts [1, groups, size], 0 for
    padding.
    """

    w: Tensor
    count: Tensor

    @classmethod
    def of(cls, weight: Tensor, importance: Tensor, packing: Packing) -> "_Groups":
        columns = weight.shape[1]
        padding = -columns % packing.group_size
        w = torch.nn.functional.pad(weight, (0, padding)).view(len(weight), -1, packing.group_size)
        count = torch.nn.functional.pad(importance, (0, padding)).view(1, -1, packing.group_size)
        # Only what columns of one group count against each other matters when it is fitted.
        mean = count.sum(2, keepdim=True) / (torch.count_nonzero(count, 2)[..., None]).clamp(min=1)
        return cls(w, count if w.shape[1] > 1 else count / mean.clamp(min=1e-30))


def _row_scales(groups: _Groups, packing: Packing) -> tuple[Tensor, Tensor]:
    """ds and dm [rows] (float32 that fp16 holds) of least error among some: a smaller one clips a
    few groups.
    """
    scale, minimum = _search(groups, packing)
    ds = _largest(scale.clamp(min=0), packing.max_s)
    dm = _largest(minimum.clamp(min=0) if packing.min_m == 0 else minimum.abs(), packing.max_m)
    if packing.scale_bits == 8:
        return ds, dm
    best = torch.full_like(ds, torch.inf)
    whole_ds, whole_dm = ds, dm
    for part in _DS_PARTS:
        tried = (whole_ds * part).half().float()
        *_, error = _under_row_scales(groups, scale, minimum, tried, whole_dm, packing)
        ds, best = torch.where(error < best, tried, ds), torch.minimum(error, best)
    for part in _DM_PARTS:
        tried = (whole_dm * part).half().float()
        *_, error = _under_row_scales(groups, scale, minimum, ds, tried, packing)
        dm, best = torch.where(error < best, tried, dm), torch.minimum(error, best)
    return ds, dm


def _under_row_scales(
    groups: _Groups, scale: Tensor, minimum: Tensor, ds: Tensor, dm: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(S, M [rows, groups], nearest codes [rows, groups, size], weighted squared error [rows]), all
    float32.

    M is the one of least error under the rounded S.
    """
    s = (scale / torch.where(ds > 0, ds, 1.0)[:, None]).round_().clamp_(0, packing.max_s)
    step = ds[:, None] * s
    codes = _codes(groups.w, step, minimum, packing.max_code)
    total = groups.count.sum(2).clamp(min=1e-30)
    minimum = (groups.count * (codes * step[:, :, None] - groups.w)).sum(2) / total
    m = (
        (minimum / torch.where(dm > 0, dm, 1.0)[:, None])
        .round_()
        .clamp_(packing.min_m, packing.max_m)
    )
    minimum = dm[:, None] * m
    codes = _codes(groups.w, step, minimum, packing.max_code)
    error = groups.count * (codes * step[:, :, None] - minimum[:, :, None] - groups.w).square()
    return s, m, codes, error.sum((1, 2))


def _largest(values: Tensor, most: int) -> Tensor:
    """The row scale [rows] that gives the largest value the integer `most`; UnfitWeightsError if
    fp16 lacks it.
    """
    row = values.amax(1) / most
    if float(row.max()) > FP16_MAX:
        raise UnfitWeightsError(f"a weight scale of {float(row.max()):.3g} does not fit into fp16")
    return torch.where(row > 0, row.clamp(min=FP16_TINY), row).half().float()


def _search(groups: _Groups, packing: Packing) -> tuple[Tensor, Tensor]:
    """Scale and minimum, float32 [rows, groups], of least weighted error: each start refined by
    least squares.
    """
    w, count = groups.w, groups.count
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
            scale, minimum = slope, offset
        codes = _codes(w, scale, minimum, packing.max_code)
        error = (count * (codes * scale[:, :, None] - minimum[:, :, None] - w).square()).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _starts(w: Tensor, packing: Packing) -> Iterator[tuple[Tensor, Tensor]]:
    """Scale and minimum of the group's range, and of less and less of it around its middle."""
    low, high = w.amin(2), w.amax(2)
    middle = (low + high) / 2
    if packing.min_m == 0:
        # An unsigned M: minima are not above zero.
        low, middle = low.clamp(max=0), torch.zeros_like(low)
    for shrink in _SHRINKS:
        yield (high - low) * (shrink / packing.max_code), -(middle + (low - middle) * shrink)


def _codes(w: Tensor, scale: Tensor, minimum: Tensor, max_code: int) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((w + minimum[:, :, None]) * inverse[:, :, None]).round_().clamp_(0, max_code)


def _with_gain(
    weight: Tensor, matrix: QuantizedMatrix, packing: Packing, hessian: Tensor | None
) -> QuantizedMatrix:
    """Both row scales times ⟨w,w⟩/⟨w,w'⟩, in the metric of the hessian: least squares had made rows
    too small.
    """
    found = dequantize(matrix, packing.group_size)
    metric = weight if hessian is None else _times(weight, hessian)
    gain = (weight * metric).sum(1) / (found * metric).sum(1)
    gain = torch.where((gain > 1 / _MAX_GAIN) & (gain < _MAX_GAIN), gain, 1.0)
    largest = (torch.maximum(matrix.ds.float(), matrix.dm.float()) * gain).amax()
    if float(largest) > FP16_MAX:
        return matrix
    ds, dm = ((scale.float() * gain).half() for scale in (matrix.ds, matrix.dm))
    return QuantizedMatrix(matrix.codes, matrix.s, matrix.m, ds, dm)


def _times(weight: Tensor, hessian: Tensor) -> Tensor:
    """weight · H for a block-diagonal H."""
    rows, columns = weight.shape
    blocks, width, _ = hessian.shape
    padded = torch.nn.functional.pad(weight, (0, blocks * width - columns)).view(
        rows, blocks, width
    )
    return torch.bmm(padded.transpose(0, 1), hessian).transpose(0, 1).reshape(rows, -1)[:, :columns]


def _checked(weight: Tensor, packing: Packing) -> Tensor:
    """float32 weights that the packing's scales can reach; beyond that, squared errors overflow
    unseen.
    """
    if count := int((~torch.isfinite(weight)).sum()):
        raise NonFiniteWeightsError(count)
    weight = weight.float()
    largest = float(weight.abs().max())
    if largest > FP16_MAX * (packing.max_s * packing.max_code + packing.max_m):
        raise UnfitWeightsError(f"weights up to {largest:g} do not fit under scales in fp16")
    return weight


def _error(weight: Tensor, matrix: QuantizedMatrix, packing: Packing) -> SquaredError:
    deviation = (dequantize(matrix, packing.group_size) - weight).double()
    return SquaredError(float(deviation.square_().sum()), float(weight.double().square_().sum()))
