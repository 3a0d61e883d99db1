"""The hqq package as solver: hqq's scales, rounded to the packing's, codes chosen again."""

import pytest
import torch

from converter.solvers.hqq_package import quantize_rows, round_scales
from converter.squared_error import SquaredError
from formats.errors import SourceError
from formats.packing import PACKINGS, tile_packing_named
from formats.tiles import dequantize

ALL = list(PACKINGS)


def weights(rows: int = 64, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("name", ALL)
def test_error_is_what_the_dequantized_weights_show(name: str) -> None:
    packing, weight = tile_packing_named(name), weights()
    matrix, error = quantize_rows(weight, packing)
    difference = (dequantize(matrix, packing.group_size) - weight).double().square().sum()
    assert error.error == pytest.approx(float(difference), rel=1e-12)
    expected = {2: 0.32, 3: 0.20, 4: 0.095}[packing.nbits]
    assert error.relative < expected


@pytest.mark.parametrize("name", ALL)
def test_rounding_the_scales_changes_the_weights_of_hqq(name: str) -> None:
    """hqq ignores its own options for quantized scales; ours must really be rounded."""
    from hqq.core.quantize import Quantizer

    packing, weight = tile_packing_named(name), weights()
    codes, meta = Quantizer.quantize(
        weight,
        nbits=packing.nbits,
        group_size=packing.group_size,
        axis=1,
        bitpack=False,
        device="cpu",
    )
    unrounded = ((codes - meta["zero"]) * meta["scale"]).view_as(weight)
    rounded = dequantize(quantize_rows(weight, packing)[0], packing.group_size)
    assert float((rounded != unrounded).float().mean()) > 0.9
    assert float((rounded - weight).norm()) < 1.1 * float((unrounded - weight).norm())


@pytest.mark.parametrize("name", ALL)
def test_codes_are_the_nearest_after_the_scales_were_rounded(name: str) -> None:
    packing, weight = tile_packing_named(name), weights()
    matrix, _ = quantize_rows(weight, packing)
    g = packing.group_size
    step = (matrix.ds.double()[:, None] * matrix.s).repeat_interleave(g, 1)
    offset = (matrix.dm.double()[:, None] * matrix.m).repeat_interleave(g, 1)
    candidates = torch.stack([step * q - offset for q in range(packing.max_code + 1)])
    best = (candidates - weight.double()).abs().amin(0)
    ours = (dequantize(matrix, g).double() - weight.double()).abs()
    assert float((ours - best).max()) < 1e-7


@pytest.mark.parametrize("name", ALL)
def test_group_of_equal_weights_does_not_spoil_its_row(name: str) -> None:
    """hqq gives a group with no range the scale 1, a hundred times the others'."""
    packing, weight = tile_packing_named(name), weights()
    weight[3, : packing.group_size] = -0.01
    matrix, _ = quantize_rows(weight, packing)
    error = (dequantize(matrix, packing.group_size) - weight)[3]
    assert float(error.norm() / weight[3].norm()) < 0.35
    assert float(error[: packing.group_size].abs().max()) < 0.003


@pytest.mark.parametrize("name", ALL)
def test_zero_weights_stay_zero(name: str) -> None:
    packing = tile_packing_named(name)
    matrix, error = quantize_rows(torch.zeros(32, 256), packing)
    assert not dequantize(matrix, packing.group_size).any()
    assert error.relative == 0.0


@pytest.mark.parametrize("name", ALL)
def test_columns_that_fill_no_group_are_quantized_too(name: str) -> None:
    packing, weight = tile_packing_named(name), weights(40, 300)
    matrix, error = quantize_rows(weight, packing)
    assert matrix.codes.shape == (40, 300)
    assert error.relative < 0.35


def test_chunks_of_rows_give_the_same_as_rows_alone_when_hqq_stops_alike() -> None:
    packing, weight = tile_packing_named("tile32-q4-g64-s8"), weights()
    scale, minimum = torch.rand(64, 4) * 0.01 + 0.001, torch.rand(64, 4) * 0.02
    whole = round_scales(weight, scale, minimum, packing)
    part = round_scales(weight[32:], scale[32:], minimum[32:], packing)
    assert torch.equal(whole.codes[32:], part.codes)


def test_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(SourceError, match="does not fit into fp16"):
        quantize_rows(weights() * 1e9, tile_packing_named("tile32-q2-g16-s4"))


def test_relative_error_of_nothing_is_zero() -> None:
    assert SquaredError().relative == 0.0
