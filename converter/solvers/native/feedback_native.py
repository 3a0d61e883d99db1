"""Error feedback (GPTQ/OBQ) by the native solver: each column's rounding error is carried to the
columns after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.input_statistics import HESSIAN_DAMPING
from converter.solver_errors import SingularStatisticsError
from converter.solvers.native.refit_native import refit_tiles
from converter.solvers.native.tile_place import check_place
from converter.squared_error import SquaredError

GAIN_RANK = 32
"""Directions of a full-width Hessian that the gain sees exactly; from 16 on no further gain in KL
was seen.
"""

EXACT_GAIN_COLUMNS = 1024
"""Blocks up to this width take the gain in the whole Hessian's metric."""


@dataclass(frozen=True)
class FeedbackErrors:
    """Errors of a matrix, with e = weight - dequantized and H the Hessian without damping.

    weights: sums of e² and weight². outputs: sums over rows of eᵀHe and wᵀHw; without the exact
    gain both are estimates, good to a few percent.
    """

    weights: SquaredError
    outputs: SquaredError

    @classmethod
    def over_tiles(cls, tile_errors: Sequence[Tensor]) -> "FeedbackErrors":
        """Return the sum of float64 [tiles, 4] tensors, tile by tile in order.

        The order fixes the last bits, however the tiles were dealt to threads.
        """
        sums = [0.0] * 4
        for row in torch.cat(list(tile_errors)).tolist():
            sums = [total + part for total, part in zip(sums, row, strict=True)]
        return cls(SquaredError(*sums[:2]), SquaredError(*sums[2:]))


def hessian_factor(hessian: Tensor, damping: float = HESSIAN_DAMPING) -> Tensor:
    """The upper triangular V, float32, with V·V^T = H + damping·mean(diag H)·I, for each block of
    columns.

    hessian: float32 or float64 [columns, columns], or [blocks, columns of a block, the same];
    symmetric. Inputs that never differ from zero have a zero row and column. Where columns do not
    fill the last block, its rest is zero. V, not the factor of the inverse that GPTQ takes: the
    same codes, without inverting (converter/native/feedback.h). Raises SingularStatisticsError.
    """
    blocks = hessian if hessian.dim() == 3 else hessian[None]
    factors = torch.empty_like(blocks, dtype=torch.float32)
    for index, block in enumerate(blocks):
        factors[index] = _block_factor(block, damping, index)
    return factors.view(hessian.shape)


def _block_factor(block: Tensor, damping: float, index: int) -> Tensor:
    added = _damping_of(block, damping)
    if not 0 <= added < torch.inf:
        raise SingularStatisticsError(index)
    for dtype in dict.fromkeys((block.dtype, torch.float64)):
        # Cholesky of the matrix turned around, turned back, is upper triangular.
        turned = block.to(dtype).flip(0, 1)
        diagonal = turned.diagonal()
        diagonal += added
        diagonal[diagonal == 0] = 1.0
        lower, info = torch.linalg.cholesky_ex(turned)
        factor: Tensor = lower.flip(0, 1).float()
        if info == 0 and bool(torch.isfinite(factor).all()) and float(factor.diagonal().min()) > 0:
            return factor
    raise SingularStatisticsError(index)


@dataclass(frozen=True)
class GainMetric:
    """In what a row's gain is taken where the whole Hessian would cost too much: its largest part,
    and a diagonal.

    low_rank: float32 [columns, rank], G with G·G^T ≈ H but for directions that carry little.
    diagonal: float32 [columns], the diagonal of H + damping - G·G^T.
    pairing: float32 [columns]. <w, e>, e being the error of w, has the expected value sum of V_kk²
    w_k δ_k, δ_k what the rounding of column k left, if columns of w are independent; these are its
    weights, less the part that G sees.
    """

    low_rank: Tensor
    diagonal: Tensor
    pairing: Tensor


def gain_metric(factor: Tensor, rank: int = GAIN_RANK) -> GainMetric:
    """The metric for a full-width factor [columns, columns]: its `rank` largest directions, by
    subspace iteration.
    """
    columns = len(factor)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(columns, min(rank + 16, columns), generator=generator)
    for _ in range(3):
        basis = torch.linalg.qr(factor @ (factor.T @ basis))[0]
    image = factor.T @ basis
    values, vectors = torch.linalg.eigh(image.T @ image)
    kept = min(rank, len(values))
    low_rank = basis @ (vectors[:, -kept:] * values[-kept:].clamp(min=0).sqrt())
    solved = torch.linalg.solve_triangular(factor, low_rank, upper=True)
    own = factor.diagonal()
    pairing = own.square() - own * (low_rank * solved).sum(1)
    diagonal = (factor.square().sum(1) - low_rank.square().sum(1)).clamp(min=0)
    return GainMetric(low_rank.contiguous(), diagonal, pairing)


def _metric_of_blocks(blocks: Tensor, columns: int) -> GainMetric:
    if len(blocks) == 1:
        return gain_metric(blocks[0])
    diagonal = blocks.square().sum(2).reshape(-1)[:columns]
    pairing = blocks.diagonal(dim1=1, dim2=2).square().reshape(-1)[:columns]
    return GainMetric(torch.empty(columns, 0), diagonal, pairing)


def _damping_of(block: Tensor, damping: float) -> float:
    """What damping adds to the diagonal. Inputs that are always zero do not count: there may be
    many.
    """
    diagonal = block.diagonal().double()
    alive = diagonal != 0
    return damping * float(diagonal.sum()) / int(alive.sum()) if alive.any() else 0.0


def quantize_feedback_tiles(
    weight: Tensor,
    packing: str,
    out: Tensor,
    factor: Tensor,
    hessian: Tensor,
    *,
    damping: float = HESSIAN_DAMPING,
    tile_begin: int = 0,
    tile_end: int | None = None,
    stride_tiles: int = 1,
    order: Tensor | None = None,
    exact_gain: bool | None = None,
    metric: GainMetric | None = None,
    static: bool = False,
    isa: str = "auto",
) -> Tensor:
    """Quantizes tiles `tile_begin`..`tile_end`-1 of a matrix into `out`; several threads may share
    a matrix.

    weight, out, tile_begin, tile_end, stride_tiles, isa: as in `solver_native.quantize_tiles`; same
    errors.
    factor, hessian: as `hessian_factor(hessian, damping)` gave it, float32 [columns, columns], or
    [blocks, B, B] with B a multiple of 256.
    order: int32 [groups], in which order the groups are taken
    (converter/solvers/feedback_order.py); factor, hessian and metric are then of the columns in
    that order.
    exact_gain: each row's gain in the metric of the whole Hessian, which costs as much again as the
    feedback. Else by `metric`, which is `gain_metric(factor)`: pass it where a matrix is quantized
    in several calls, or gate and up share it. Default: in blocks of up to EXACT_GAIN_COLUMNS, so
    that only wider ones need a metric.
    static: S and M from the weights alone, before any error is carried to them; faster by a little,
    worse by a lot. Returns fp64 [tiles, 4]: see `FeedbackErrors.over_tiles`.
    """
    place = check_place(weight, packing, out, tile_begin, tile_end, stride_tiles)
    blocks, hessians = (factor, hessian) if factor.dim() == 3 else (factor[None], hessian[None])
    columns, block = weight.shape[1], blocks.shape[-1]
    good = factor.dtype == torch.float32 and factor.is_contiguous() and blocks.dim() == 3
    if not good or blocks.shape[1:] != (block, block) or len(blocks) != -(-columns // block):
        raise ValueError(
            f"factor is {factor.dtype} {tuple(factor.shape)}, weight {tuple(weight.shape)}"
        )
    if hessians.shape != blocks.shape:
        raise ValueError(f"hessian has shape {tuple(hessian.shape)}, factor {tuple(factor.shape)}")
    if block % 256 and block != columns:
        raise ValueError(f"blocks have {block} columns, must be a multiple of 256 or all {columns}")
    errors = torch.zeros(place.count, 4, dtype=torch.float64)
    if not place.count:
        return errors
    if order is not None and (
        order.dtype != torch.int32 or order.shape != (columns // place.packing.group_size,)
    ):
        raise ValueError(f"order is {order.dtype} {tuple(order.shape)}")
    squares = blocks.diagonal(dim1=1, dim2=2).reshape(-1)[:columns].double().square()
    unit = float(squares.mean())
    added = torch.tensor([_damping_of(one, damping) for one in hessians], dtype=torch.float64)
    if block <= EXACT_GAIN_COLUMNS if exact_gain is None else exact_gain:
        gain: dict[str, Tensor] = {}
    else:
        metric = metric or _metric_of_blocks(blocks, columns)
        gain = {"diagonal": metric.diagonal / unit, "pairing": metric.pairing / unit}
        if metric.low_rank.shape[1]:
            gain["low_rank"] = metric.low_rank / unit**0.5
    refit_tiles(
        place,
        errors,
        importance=(squares / unit).float(),
        factor=factor,
        order=order,
        damping=added / unit,
        **gain,
        static=static,
        isa=isa,
    )
    errors[:, 2:] *= unit
    return errors


def quantize_feedback(
    weight: Tensor, packing: str, out: Tensor, factor: Tensor, hessian: Tensor, **options: Any
) -> FeedbackErrors:
    """Quantizes a whole matrix into `out` on this thread; arguments and errors as in
    `quantize_feedback_tiles`.
    """
    return FeedbackErrors.over_tiles(
        [quantize_feedback_tiles(weight, packing, out, factor, hessian, **options)]
    )
