"""Error feedback by the native library: later columns compensate each column's rounding error."""

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
"""Rank of the low-rank part of a full-width Hessian. Above 16, KL did not improve further."""

EXACT_GAIN_COLUMNS = 1024
"""Widest block for which the gain uses the whole Hessian by default."""


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

        The order fixes the last bits, however the tiles are split among threads.
        """
        sums = [0.0] * 4
        for row in torch.cat(list(tile_errors)).tolist():
            sums = [total + part for total, part in zip(sums, row, strict=True)]
        return cls(SquaredError(*sums[:2]), SquaredError(*sums[2:]))


def hessian_factor(hessian: Tensor, damping: float = HESSIAN_DAMPING) -> Tensor:
    """Return V, upper triangular with V·Vᵀ = H + damping·mean(diag H)·I, float32, for each block.

    hessian: symmetric, float32 or float64 [columns, columns] or [blocks, width, width]. An input
    that is always zero has a zero row and column. The last block is padded with zeros.
    GPTQ factorizes the inverse of H; V gives the same codes without inverting
    (converter/native/feedback.h). Raises SingularStatisticsError.
    """
    blocks = hessian if hessian.dim() == 3 else hessian[None]
    factors = torch.empty_like(blocks, dtype=torch.float32)
    for index, block in enumerate(blocks):
        factors[index] = _block_factor(block, damping, index)
    return factors.view(hessian.shape)


def _block_factor(block: Tensor, damping: float, index: int) -> Tensor:
    added = _added_damping(block, damping)
    if not 0 <= added < torch.inf:
        raise SingularStatisticsError(index)
    for dtype in dict.fromkeys((block.dtype, torch.float64)):
        # Flip, factorize, flip back: the lower Cholesky factor becomes upper triangular.
        flipped = block.to(dtype).flip(0, 1)
        diagonal = flipped.diagonal()
        diagonal += added
        diagonal[diagonal == 0] = 1.0
        lower, info = torch.linalg.cholesky_ex(flipped)
        factor: Tensor = lower.flip(0, 1).float()
        if info == 0 and bool(torch.isfinite(factor).all()) and float(factor.diagonal().min()) > 0:
            return factor
    raise SingularStatisticsError(index)


@dataclass(frozen=True)
class GainMetric:
    """Cheap approximation of H for a row's gain: a low-rank part and a diagonal.

    low_rank: G, float32 [columns, rank]; G·Gᵀ holds the largest directions of H.
    diagonal: diagonal of H + damping - G·Gᵀ, float32 [columns].
    pairing: float32 [columns], weights that estimate ⟨w, e⟩ for the error e of a row w. With
    independent columns its expected value is Σ V_kk²·w_k·δ_k, δ_k being the rounding error of
    column k. pairing is V_kk² minus the part that G covers.
    """

    low_rank: Tensor
    diagonal: Tensor
    pairing: Tensor


def gain_metric(factor: Tensor, rank: int = GAIN_RANK) -> GainMetric:
    """Return the metric for a full-width factor [columns, columns], by subspace iteration."""
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
    v_diagonal = factor.diagonal()
    pairing = v_diagonal.square() - v_diagonal * (low_rank * solved).sum(1)
    diagonal = (factor.square().sum(1) - low_rank.square().sum(1)).clamp(min=0)
    return GainMetric(low_rank.contiguous(), diagonal, pairing)


def _block_metric(blocks: Tensor, columns: int) -> GainMetric:
    if len(blocks) == 1:
        return gain_metric(blocks[0])
    diagonal = blocks.square().sum(2).reshape(-1)[:columns]
    pairing = blocks.diagonal(dim1=1, dim2=2).square().reshape(-1)[:columns]
    return GainMetric(torch.empty(columns, 0), diagonal, pairing)


def _added_damping(block: Tensor, damping: float) -> float:
    """Return the number that damping adds to the diagonal.

    The mean leaves out inputs that are always zero, because there may be many.
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
    """Quantize tiles `tile_begin`..`tile_end` (exclusive) of a matrix into `out`.

    Several threads may share a matrix. Returns float64 [tiles, 4]; `FeedbackErrors.over_tiles` adds
    them up.

    weight, packing, out, tile_begin, tile_end, stride_tiles, isa, exceptions: as in
    `hqq_native.quantize_tiles`.
    hessian: float32 [columns, columns], or [blocks, width, width] with width a multiple of 256.
    factor: `hessian_factor(hessian, damping)`.
    order: order of the groups, int32 [groups] (converter/solvers/feedback_order.py). factor,
    hessian and metric must have the columns in this order.
    exact_gain: measure each row's gain with the whole Hessian, which doubles the time. Otherwise
    use `metric`. Default: True for blocks of up to EXACT_GAIN_COLUMNS columns.
    metric: `gain_metric(factor)`. It is computed if missing; pass it to share it between calls.
    static: fit S and M to the weights before any error is carried; slightly faster, much worse.
    """
    place = check_place(weight, packing, out, tile_begin, tile_end, stride_tiles)
    blocks, hessians = (factor, hessian) if factor.dim() == 3 else (factor[None], hessian[None])
    _check_factor(weight, blocks, hessians, factor.is_contiguous())
    columns = weight.shape[1]
    width = blocks.shape[-1]
    errors = torch.zeros(place.count, 4, dtype=torch.float64)
    if not place.count:
        return errors
    groups = columns // place.packing.group_size
    if order is not None and (order.dtype != torch.int32 or order.shape != (groups,)):
        raise ValueError(f"order is {order.dtype} {tuple(order.shape)}, must be int32 [{groups}]")
    squares = blocks.diagonal(dim1=1, dim2=2).reshape(-1)[:columns].double().square()
    unit = float(squares.mean())
    added = torch.tensor([_added_damping(one, damping) for one in hessians], dtype=torch.float64)
    if width <= EXACT_GAIN_COLUMNS if exact_gain is None else exact_gain:
        gain: dict[str, Tensor] = {}
    else:
        metric = metric or _block_metric(blocks, columns)
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
    """Quantize a whole matrix into `out` in this thread.

    Options and exceptions as in `quantize_feedback_tiles`.
    """
    return FeedbackErrors.over_tiles(
        [quantize_feedback_tiles(weight, packing, out, factor, hessian, **options)]
    )


def _check_factor(weight: Tensor, factor: Tensor, hessian: Tensor, contiguous: bool) -> None:
    """Raise ValueError unless factor and hessian fit the weight's columns, in blocks."""
    columns = weight.shape[1]
    width = factor.shape[-1]
    good = factor.dtype == torch.float32 and contiguous and factor.dim() == 3
    if not good or factor.shape[1:] != (width, width) or len(factor) != -(-columns // width):
        raise ValueError(
            f"factor is {factor.dtype} {tuple(factor.shape)}, must be contiguous float32"
            f" [blocks, width, width] for the {columns} columns of the weight"
        )
    if hessian.shape != factor.shape:
        raise ValueError(f"hessian has shape {tuple(hessian.shape)}, factor {tuple(factor.shape)}")
    if width % 256 and width != columns:
        raise ValueError(f"blocks have {width} columns, must be a multiple of 256 or all {columns}")
