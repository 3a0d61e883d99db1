"""The solvers refit and feedback in torch: their objectives and refusals."""

import pytest
import torch

from converter.solver_errors import NonFiniteWeightsError, SingularStatisticsError
from converter.solvers.feedback_order import (
    columns_in_order,
    group_order,
    hessian_in_order,
    matrix_in_place,
)
from converter.solvers.feedback_reference import feedback_rows, inverse_factor
from converter.solvers.hqq_package import quantize_rows
from converter.solvers.refit_reference import refit_rows
from formats.packing import PACKINGS
from formats.tiles import dequantize, pack, unpack

every_packing = pytest.mark.parametrize("packing", PACKINGS.values(), ids=list(PACKINGS))


def weights(rows: int = 64, columns: int = 384, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(columns: int = 384, tokens: int = 2000) -> torch.Tensor:
    """Return correlated inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(tokens, 40, generator=generator) @ torch.randn(
        40, columns, generator=generator
    )
    x = mixed + 2 * torch.randn(tokens, columns, generator=generator)
    x[:, ::50] *= 10
    return x


def hessian(x: torch.Tensor, width: int) -> torch.Tensor:
    blocks = -(-x.shape[1] // width)
    padded = torch.nn.functional.pad(x, (0, blocks * width - x.shape[1])).view(
        len(x), blocks, width
    )
    return torch.einsum("tbi,tbj->bij", padded, padded) / len(x)


def output_error(weight: torch.Tensor, matrix: object, packing: object, x: torch.Tensor) -> float:
    wrong = dequantize(matrix, packing.group_size) - weight  # type: ignore[arg-type, attr-defined]
    return float((x @ wrong.T).square().mean() / (x @ weight.T).square().mean())


def test_factor_is_the_upper_root_of_the_damped_inverse() -> None:
    h = hessian(inputs(), 384)
    factor = inverse_factor(h, 0.05)[0].double()
    damped = h[0].double() + 0.05 * h[0].double().diagonal().mean() * torch.eye(
        384, dtype=torch.float64
    )
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(384, dtype=torch.float64), rtol=0, atol=1e-3
    )
    assert torch.equal(factor, factor.triu())


@every_packing
@pytest.mark.parametrize("width", [256, 384])
def test_feedback_lowers_the_error_of_outputs(packing: object, width: int) -> None:
    w, x = weights(), inputs()
    h = hessian(x, width)
    matrix, _ = feedback_rows(w, packing, h, inverse_factor(h))  # type: ignore[arg-type]
    plain, _ = refit_rows(w, packing)  # type: ignore[arg-type]
    assert output_error(w, matrix, packing, x) < 0.8 * output_error(w, plain, packing, x)


@every_packing
def test_refit_lowers_the_weight_error_of_hqq(packing: object) -> None:
    w = weights()
    _, error = refit_rows(w, packing)  # type: ignore[arg-type]
    _, hqq = quantize_rows(w, packing)  # type: ignore[arg-type]
    assert error.relative < 1.03 * hqq.relative


@every_packing
def test_result_survives_packing(packing: object) -> None:
    w, x = weights(40, 200), inputs(200)
    h = hessian(x, 256)
    for matrix, _ in (refit_rows(w, packing), feedback_rows(w, packing, h, inverse_factor(h))):  # type: ignore[arg-type]
        again = unpack(pack(matrix, packing), packing, 40, 200)  # type: ignore[arg-type]
        assert torch.equal(
            dequantize(again, packing.group_size),  # type: ignore[attr-defined]
            dequantize(matrix, packing.group_size),  # type: ignore[attr-defined]
        )


@every_packing
def test_rows_do_not_depend_on_each_other(packing: object) -> None:
    w, h = weights(), hessian(inputs(), 384)
    factor = inverse_factor(h)
    whole, _ = feedback_rows(w, packing, h, factor)  # type: ignore[arg-type]
    part, _ = feedback_rows(w[32:], packing, h, factor)  # type: ignore[arg-type]
    assert float((whole.codes[32:] != part.codes).float().mean()) < 0.01  # gemm may round otherwise


def test_zero_rows_and_dead_columns_stay_zero_and_harmless() -> None:
    w, x = weights(), inputs()
    w[3] = 0
    x[:, 100:130] = 0
    packing = PACKINGS["tile32-q2-g16-s4"]
    h = hessian(x, 384)
    matrix, error = feedback_rows(w, packing, h, inverse_factor(h))
    found = dequantize(matrix, packing.group_size)
    assert not found[3].any()
    assert torch.isfinite(found).all()
    assert error.relative < 0.6


@pytest.mark.parametrize("h", [torch.zeros(1, 8, 8), torch.full((1, 8, 8), torch.nan)])
def test_singular_statistics_are_refused(h: torch.Tensor) -> None:
    with pytest.raises(SingularStatisticsError):
        inverse_factor(h)


def test_weights_that_are_not_finite_are_refused() -> None:
    w = weights()
    w[0, 0] = torch.inf
    with pytest.raises(NonFiniteWeightsError):
        refit_rows(w, PACKINGS["tile32-q2-g16-s4"])


@every_packing
def test_strongest_groups_go_first_and_end_where_they_were(packing: object) -> None:
    w, x = weights(), inputs()
    x[:, 320:] *= 100
    size = packing.group_size  # type: ignore[attr-defined]
    h = hessian(x, 384)
    order = group_order(h, 384, size)
    assert order is not None
    assert int(order[0]) >= 320 // size
    ordered = hessian_in_order(h, order, size)
    moved, _ = feedback_rows(
        w[:, columns_in_order(order, size)], packing, ordered, inverse_factor(ordered)
    )  # type: ignore[arg-type]
    plain, _ = feedback_rows(w, packing, h, inverse_factor(h))  # type: ignore[arg-type]
    matrix = matrix_in_place(moved, order, size)
    assert output_error(w, matrix, packing, x) < 0.8 * output_error(w, plain, packing, x)


def test_columns_that_fill_no_group_are_taken_as_they_stand() -> None:
    assert group_order(torch.ones(1, 200, 200), 200, 64) is None
