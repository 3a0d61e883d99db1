"""The correction of down: the error that it removes, and the weights that it does not change."""

import pytest
import torch

from converter.calibration.moments import block_moments
from converter.solvers.down_correction import DownCorrection

WIDTH = 64


def activations(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the original activations, and others that lack a part of them and add a part."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(3000, 20, generator=generator) @ torch.randn(
        20, columns, generator=generator
    )
    return original, 0.8 * original + 0.1 * original.roll(1, 1) + 0.3 * torch.randn(
        3000, columns, generator=generator
    )


@pytest.mark.parametrize("columns", [64, 150])
def test_corrected_weights_come_nearer_to_the_originals_outputs(columns: int) -> None:
    original, found = activations(columns)
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(len(original))
    correction = DownCorrection.solve(
        block_moments(original - found, ones, WIDTH, found), block_moments(found, ones, WIDTH)
    )
    assert correction is not None
    corrected = correction.apply(weight.bfloat16())
    wanted = original @ weight.T
    assert corrected.shape == weight.shape
    assert (found @ corrected.T - wanted).square().sum() < 0.5 * (
        found @ weight.T - wanted
    ).square().sum()


def test_without_a_difference_the_weights_stay_as_they_are() -> None:
    _, found = activations(100)
    weight = torch.randn(40, 100)
    correction = DownCorrection.solve(
        torch.zeros(2, WIDTH, WIDTH), block_moments(found, torch.ones(3000), WIDTH)
    )
    assert correction is not None
    assert torch.equal(correction.apply(weight), weight)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    correction = DownCorrection.solve(torch.zeros(1, WIDTH, WIDTH), torch.zeros(1, WIDTH, WIDTH))
    assert correction is not None
    assert not correction.factor.any()


def test_sums_that_are_not_finite_give_no_correction() -> None:
    moment = torch.eye(WIDTH)[None]
    assert DownCorrection.solve(torch.full((1, WIDTH, WIDTH), torch.nan), moment) is None
    assert DownCorrection.solve(torch.zeros(1, WIDTH, WIDTH), moment * torch.inf) is None
