"""The solver `feedback` in torch: error feedback on top of `refit`.

It is the reference of the native code and replaces it if there is no native library. Error feedback
is GPTQ's (Frantar et al. 2022, section 3): it rounds columns from left to right, and the columns to
the right compensate each column's error. Each group is fitted when its turn comes, to its weights
with the errors carried so far. On tiny-mixtral at 2 bits this gives KL .0071, against .0088 for
groups fitted in advance (bench/quality.py).
"""

import torch
from torch import Tensor

from converter.input_statistics import HESSIAN_DAMPING
from converter.solver_errors import SingularStatisticsError
from converter.solvers.reference_math import FP16_MAX, quantization_error
from converter.solvers.refit_reference import (
    WeightGroups,
    checked_weights,
    row_scales,
    search_scales,
    under_row_scales,
    with_gain,
)
from converter.squared_error import SquaredError
from formats.packing import Packing
from formats.tiles import QuantizedMatrix

_HEADROOM = 1.06
"""Factor on the row scales: they are fitted to the original weights, and carried errors widen a
group's range.
"""


def inverse_factor(hessian: Tensor, damping: float = HESSIAN_DAMPING) -> Tensor:
    """Return U, upper triangular with UᵀU = (H + damping · mean diagonal · I)⁻¹.

    hessian: float32 [..., n, n]; the result has the same shape and dtype. A block of zeros gets a
    multiple of the identity: no input reaches its columns. Raises SingularStatisticsError.
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


def feedback_rows(
    weight: Tensor, packing: Packing, hessian: Tensor, factor: Tensor
) -> tuple[QuantizedMatrix, SquaredError]:
    """Quantize `weight` [rows, columns] with error feedback.

    hessian: float32 [blocks, width, width], as in InputStatistics. factor: from `inverse_factor`.
    Row scales are fitted first; S and M of a group when its turn comes, to its weights with the
    errors carried so far.
    """
    weight = checked_weights(weight, packing)
    rows, columns = weight.shape
    blocks, width, _ = hessian.shape
    size = packing.group_size
    # Cost of a column's error after the columns to its right compensate it: 1 / U² (GPTQ's loss).
    importance = factor.diagonal(dim1=1, dim2=2).reshape(-1)[:columns].square().reciprocal()
    fitted = row_scales(WeightGroups.split(weight, importance, packing), packing)
    ds, dm = ((scale * _HEADROOM).clamp(max=FP16_MAX).half().float() for scale in fitted)
    codes = torch.empty(rows, columns)
    n_groups = -(-columns // size)
    s = torch.empty(rows, n_groups)
    m = torch.empty(rows, n_groups)
    for block in range(blocks):
        first = block * width
        n = min(width, columns - first)
        left = weight[:, first : first + n].clone()
        unit = factor[block, :n, :n] / factor[block, :n, :n].diagonal()[:, None]
        for begin in range(0, n, size):
            end = min(begin + size, n)
            g = (first + begin) // size
            group = WeightGroups.split(
                left[:, begin:end], importance[first + begin : first + end], packing
            )
            group_s, group_m, _, _ = under_row_scales(
                group, *search_scales(group, packing), ds, dm, packing
            )
            s[:, g] = group_s[:, 0]
            m[:, g] = group_m[:, 0]
            step = ds * s[:, g]
            offset = dm * m[:, g]
            inverse = torch.where(step > 0, 1 / step, 0.0)
            errors = torch.empty(rows, end - begin)
            for c in range(begin, end):
                code = ((left[:, c] + offset) * inverse).round_().clamp_(0, packing.max_code)
                error = left[:, c] - (code * step - offset)
                codes[:, first + c] = code
                errors[:, c - begin] = error
                left[:, c + 1 : end].addr_(error, unit[c, c + 1 : end], alpha=-1)
            left[:, end:].addmm_(errors, unit[begin:end, end:], alpha=-1)
    matrix = QuantizedMatrix(
        codes.to(torch.uint8), s.to(torch.int16), m.to(torch.int16), ds.half(), dm.half()
    )
    matrix = with_gain(weight, matrix, packing, hessian)
    return matrix, quantization_error(weight, matrix, packing)
