"""Refit and error feedback by the native solver, against the same algorithm in float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from feedback_reference import reference
from torch import Tensor

from converter.input_statistics import HESSIAN_DAMPING
from converter.solver_errors import SingularStatisticsError
from converter.solvers.feedback_order import columns_in_order, group_order, hessian_in_order
from converter.solvers.native import feedback_native, hqq_native, solver_library
from converter.solvers.native.feedback_native import (
    FeedbackErrors,
    hessian_factor,
    quantize_feedback,
)
from converter.squared_error import SquaredError
from formats.packing import PACKINGS
from formats.tiles import QuantizedMatrix, dequantize, unpack

pytestmark = pytest.mark.skipif(not solver_library.available(), reason=solver_library.describe())

PACKING_NAMES = list(PACKINGS)
ISAS = ["portable", "avx2", "avx512"]
SHAPES = [(33, 192), (16, 384), (1, 16), (40, 300), (5, 7), (31, 257), (130, 40)]


def weights(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Return weights of Student's t with 6 degrees of freedom, similar to trained models."""
    generator = torch.Generator().manual_seed(seed)
    chi = torch.randn((6, *shape), generator=generator).square().mean(0).sqrt()
    return torch.randn(shape, generator=generator) / chi * 0.02


def hessian(columns: int, seed: int = 0, tokens: int = 0) -> Tensor:
    """Return the Hessian of correlated inputs with a mean and with channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    latent = max(columns // 4, 1)
    tokens = tokens or 4 * columns
    mix = torch.randn(latent, columns, generator=generator) / latent**0.5
    inputs = torch.randn(tokens, latent, generator=generator) @ mix
    inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
    inputs = inputs * torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs += 0.3 * torch.randn(columns, generator=generator)
    return inputs.T @ inputs / tokens


def blocks_of(whole: Tensor, size: int = 256) -> Tensor:
    """Return the diagonal blocks, [blocks, size, size]; the last one is padded with zeros."""
    count = -(-len(whole) // size)
    padded = torch.nn.functional.pad(whole, (0, count * size - len(whole)) * 2)
    return torch.stack(
        [padded[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
    )


def room(weight: Tensor, name: str) -> Tensor:
    return torch.full((PACKINGS[name].matrix_bytes(*weight.shape),), 0xA5, dtype=torch.uint8)


def feedback(weight: Tensor, name: str, metric: Tensor, **options) -> tuple[Tensor, FeedbackErrors]:
    out = room(weight, name)
    return out, quantize_feedback(weight, name, out, hessian_factor(metric), metric, **options)


def refit(weight: Tensor, name: str, **options) -> tuple[Tensor, SquaredError]:
    out = room(weight, name)
    return out, hqq_native.quantize_matrix(weight, name, out, refit=True, **options)


def unpacked(out: Tensor, name: str, weight: Tensor) -> QuantizedMatrix:
    return unpack(out.view(-(-weight.shape[0] // 32), -1), PACKINGS[name], *weight.shape)


def restored(out: Tensor, name: str, weight: Tensor) -> Tensor:
    return dequantize(unpacked(out, name, weight), PACKINGS[name].group_size)


def squares(rows: Tensor, metric: Tensor) -> float:
    return float(((rows.double() @ metric.double()) * rows.double()).sum())


def error_in(metric: Tensor, weight: Tensor, out: Tensor, name: str) -> float:
    """Relative squared error in a metric."""
    return squares(weight.float() - restored(out, name, weight), metric) / squares(weight, metric)


def usable(isa: str) -> bool:
    try:
        refit(torch.ones(1, 16), PACKING_NAMES[0], isa=isa)
    except solver_library.NativeSolverError:
        return False
    return True


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("columns", [192, 384, 100])
def test_feedback_is_that_of_the_float64_reference_but_for_ties(name: str, columns: int) -> None:
    w, metric = weights((48, columns)), hessian(columns)
    out, _ = feedback(w, name, metric)
    expected = reference(w, name, metric, HESSIAN_DAMPING)
    ours = unpacked(out, name, w)
    # A tie that falls otherwise moves every later column of its row.
    same = (
        (ours.codes == expected.codes).all(1)
        & (ours.s == expected.s).all(1)
        & (ours.m == expected.m).all(1)
    )
    assert same.float().mean() > 0.7
    assert (ours.codes == expected.codes).float().mean() > 0.9
    scales_apart = (ours.ds.float() / expected.ds.float() - 1).abs()[same]
    assert float(scales_apart.max()) < 2e-3
    theirs = squares(w - dequantize(expected, PACKINGS[name].group_size), metric) / squares(
        w, metric
    )
    assert error_in(metric, w, out, name) == pytest.approx(theirs, rel=0.01)


# ---- benefit of feedback ----


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_feedback_lowers_the_error_of_outputs(name: str) -> None:
    w, metric = weights((64, 512)).to(torch.bfloat16), hessian(512)
    out = room(w, name)
    hqq_native.quantize_matrix(w, name, out)
    hqq = error_in(metric, w, out, name)
    plain = error_in(metric, w, refit(w, name)[0], name)
    weighted = error_in(
        metric, w, refit(w, name, importance=metric.diagonal().contiguous())[0], name
    )
    in_blocks = error_in(metric, w, feedback(w, name, blocks_of(metric))[0], name)
    full = error_in(metric, w, feedback(w, name, metric)[0], name)
    assert plain < hqq
    assert weighted < 0.7 * hqq
    assert in_blocks < 0.6 * weighted
    assert full < 0.8 * in_blocks


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_static_feedback_with_the_identity_is_refit(name: str) -> None:
    for shape in SHAPES:
        w = weights(shape)
        plain, error = refit(w, name)
        out, same = feedback(w, name, torch.eye(shape[1]), static=True)
        assert torch.equal(out, plain)
        assert same.weights.error == error.error
        in_blocks = feedback(w, name, blocks_of(torch.eye(shape[1])), static=True)[0]
        assert torch.equal(in_blocks, plain)


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("exact_gain", [True, False])
def test_sums_are_those_of_the_unpacked_weights(name: str, exact_gain: bool) -> None:
    for shape in [(40, 300), (33, 192), (70, 600)]:
        w, metric = weights(shape).to(torch.bfloat16), hessian(shape[1])
        out, error = feedback(w, name, metric, exact_gain=exact_gain)
        off = w.float() - restored(out, name, w)
        assert error.weights.total == pytest.approx(float(w.double().square().sum()), rel=1e-12)
        assert error.weights.error == pytest.approx(float(off.double().square().sum()), rel=1e-6)
        close = 0.01 if exact_gain else 0.1  # estimated with the gain
        assert error.outputs.total == pytest.approx(squares(w, metric), rel=close)
        assert error.outputs.error == pytest.approx(squares(off, metric), rel=close)


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_rows_keep_their_gain(name: str) -> None:
    w, metric = weights((64, 512)), hessian(512)
    for options in ({"exact_gain": True}, {"exact_gain": False}):
        back = restored(feedback(w, name, metric, **options)[0], name, w)
        damped = metric + HESSIAN_DAMPING * metric.diagonal().mean() * torch.eye(512)
        gain = ((w @ damped) * back).sum(1) / ((w @ damped) * w).sum(1)
        assert torch.allclose(gain, torch.ones(64), atol=0.002 if options["exact_gain"] else 0.02)
    back = restored(refit(w, name)[0], name, w)
    assert torch.allclose((w * back).sum(1) / (w * w).sum(1), torch.ones(64), atol=0.002)


# ---- the same bytes ----


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_every_isa_gives_the_same_bytes_and_sums(name: str) -> None:
    for shape in SHAPES:
        w, metric = weights(shape), hessian(shape[1])
        for make in (
            lambda isa, w=w: refit(w, name, isa=isa),
            lambda isa, w=w, metric=metric: feedback(w, name, metric, isa=isa),
            lambda isa, w=w, metric=metric: feedback(w, name, metric, isa=isa, exact_gain=False),
            lambda isa, w=w, metric=metric: feedback(w, name, metric, isa=isa, static=True),
            lambda isa, w=w, metric=metric: feedback(w, name, blocks_of(metric), isa=isa),
        ):
            expected = make("portable")
            for isa in filter(usable, ISAS[1:]):
                found = make(isa)
                assert torch.equal(found[0], expected[0]), (shape, isa)
                assert found[1] == expected[1]


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_tile_ranges_on_two_threads_give_the_bytes_and_sums_of_one_call(name: str) -> None:
    w, metric = weights((11 * 32 - 7, 520)).to(torch.bfloat16), hessian(520)
    whole, error = feedback(w, name, metric)
    factor, out = hessian_factor(metric), torch.zeros_like(whole)
    tile_bytes = PACKINGS[name].tile_bytes(520)

    def part(ends: tuple[int, int]) -> Tensor:
        to = out[ends[0] * tile_bytes : ends[1] * tile_bytes]
        return feedback_native.quantize_feedback_tiles(
            w, name, to, factor, metric, tile_begin=ends[0], tile_end=ends[1]
        )

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(part, [(0, 1), (1, 1), (1, 4), (4, 11)]))
    assert torch.equal(out, whole)
    assert FeedbackErrors.over_tiles(errors) == error


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_rows_do_not_know_each_other(name: str) -> None:
    w, metric = weights((70, 300)), hessian(300)
    whole = unpacked(feedback(w, name, metric)[0], name, w)
    last = w[64:].contiguous()
    alone = unpacked(feedback(last, name, metric)[0], name, last)
    assert torch.equal(whole.codes[64:], alone.codes)
    assert torch.equal(whole.ds[64:], alone.ds)


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_gate_and_up_interleave_tile_by_tile(name: str) -> None:
    w, metric = weights((70, 300)), hessian(300)
    tile_bytes = PACKINGS[name].tile_bytes(300)
    out = torch.full((6 * tile_bytes,), 7, dtype=torch.uint8)
    quantize_feedback(w, name, out, hessian_factor(metric), metric, stride_tiles=2)
    assert (out.view(6, -1)[1::2] == 7).all()
    assert torch.equal(out.view(6, -1)[::2].reshape(-1), feedback(w, name, metric)[0])


# ---- rows and columns without anything ----


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_zero_rows_and_groups_stay_zero(name: str) -> None:
    w, metric = weights((40, 512)), hessian(512)
    w[::3] = 0
    for out in (
        refit(w, name)[0],
        feedback(w, name, torch.eye(512))[0],
        feedback(w, name, metric)[0],
    ):
        assert (restored(out, name, w)[::3] == 0).all()
        assert torch.isfinite(restored(out, name, w)).all()


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("damping", [HESSIAN_DAMPING, 0.0])
def test_dead_inputs_disturb_nothing(name: str, damping: float) -> None:
    w, metric = weights((32, 512)), hessian(512)
    metric[100:150] = 0
    metric[:, 100:150] = 0
    out = room(w, name)
    quantize_feedback(w, name, out, hessian_factor(metric, damping), metric, damping=damping)
    assert error_in(metric, w, out, name) < 0.06
    assert (w - restored(out, name, w))[:, 100:150].square().sum() < 0.5 * w[
        :, 100:150
    ].square().sum()


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_a_hessian_of_nothing_is_as_none(name: str) -> None:
    w = weights((32, 300))
    assert torch.equal(feedback(w, name, torch.zeros(300, 300), static=True)[0], refit(w, name)[0])


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_fewer_tokens_than_columns_are_enough(name: str) -> None:
    w, metric = weights((32, 512)), hessian(512, tokens=100)
    assert error_in(metric, w, feedback(w, name, metric)[0], name) < 0.05


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("factor", [1e-7, 1e-4, 1e3])
def test_small_and_large_weights_and_inputs(name: str, factor: float) -> None:
    w, metric = weights((32, 256)) * factor, hessian(256) * 1e12
    error = feedback(w, name, metric)[1]
    if factor > 1e-6:  # under that fp16 super-scales are no longer fine enough
        assert error.outputs.error < 0.05 * error.outputs.total


# ---- refusals ----


@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_weights_are_refused_with_their_number(isa: str) -> None:
    if not usable(isa):
        pytest.skip(f"no {isa} here")
    w = weights((270, 300))
    w[0, 0], w[33, 299], w[269, 5] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match="3 weights are infinite or NaN"):
        feedback(w, PACKING_NAMES[0], hessian(300), isa=isa)
    with pytest.raises(ValueError, match="3 weights are infinite or NaN"):
        refit(w, PACKING_NAMES[0], isa=isa)


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_weights_beyond_fp16_super_scales_are_refused(name: str) -> None:
    for factor in (1e10, 1e38):
        with pytest.raises(solver_library.ScaleOverflowError):
            feedback(weights((16, 64)) * factor, name, hessian(64))
        with pytest.raises(solver_library.ScaleOverflowError):
            refit(weights((16, 64)) * factor, name)


def test_a_hessian_that_is_not_positive_definite_is_refused_with_its_block() -> None:
    for wrong in (torch.nan, torch.inf, -1e6):
        metric = blocks_of(hessian(512))
        metric[1, 3, 3] = wrong
        with pytest.raises(SingularStatisticsError, match="block 1"):
            hessian_factor(metric)
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 2
    with pytest.raises(SingularStatisticsError, match="block 0"):
        hessian_factor(indefinite)


def test_the_factor_gives_the_damped_hessian_back() -> None:
    for metric in (hessian(300), hessian(300).double(), blocks_of(hessian(512))):
        factor = hessian_factor(metric, 0.1)
        assert factor.dtype == torch.float32
        assert factor.shape == metric.shape
        assert torch.equal(factor, factor.triu())
        blocks = metric if metric.dim() == 3 else metric[None]
        for v, one in zip(factor.view(blocks.shape).double(), blocks.double(), strict=True):
            damped = one + 0.1 * one.diagonal().mean() * torch.eye(len(one), dtype=torch.float64)
            assert torch.allclose(v @ v.T, damped, rtol=1e-5, atol=1e-5)


def test_wrong_tensors_are_refused() -> None:
    name, w, metric = PACKING_NAMES[0], weights((32, 512)), hessian(512)
    factor, out = hessian_factor(metric), room(w, name)
    wrong = [
        (factor.double(), metric),
        (factor[:256, :256], metric[:256, :256]),
        (factor, metric[:256, :256]),
        (factor.t(), metric),
        (torch.eye(128).expand(4, 128, 128).contiguous(), torch.eye(128).expand(4, 128, 128)),
        (factor.view(4, 256, 256), metric.view(4, 256, 256)),
    ]
    for v, h in wrong:
        with pytest.raises(ValueError):
            quantize_feedback(w, name, out, v, h)
    with pytest.raises(ValueError):
        hqq_native.quantize_matrix(w, name, out, importance=torch.ones(512))
    with pytest.raises(ValueError):
        refit(w, name, importance=torch.ones(511))


@pytest.mark.parametrize(
    ("name", "columns", "width"), [("tile32-q2-g16-s4", 384, 256), ("tile32-q3-g32-s4", 192, 192)]
)
@pytest.mark.parametrize("isa", ISAS)
def test_groups_in_another_order_are_those_of_moved_columns(
    name: str, columns: int, width: int, isa: str
) -> None:
    weight, size = weights((40, columns)), PACKINGS[name].group_size
    metric = blocks_of(hessian(columns), width)
    order = group_order(metric, columns, size)
    ordered, moved = hessian_in_order(metric, order, size), columns_in_order(order, size)
    assert not torch.equal(moved, torch.arange(columns))
    try:
        out, error = feedback(weight, name, ordered, order=order, isa=isa)
    except solver_library.NativeSolverError:
        pytest.skip(f"no {isa}")
    other, same = feedback(weight[:, moved].contiguous(), name, ordered, isa=isa)
    found, expected = (
        dequantize(unpack(bytes_.view(2, -1), PACKINGS[name], 40, columns), size)
        for bytes_ in (out, other)
    )
    assert torch.equal(found[:, moved], expected)
    assert error.outputs.error == pytest.approx(same.outputs.error)


@pytest.mark.parametrize("order", [[1, 0, 3, 2, 4, 4], [0, 1, 2, 3, 4, 6], [4, 1, 2, 3, 0, 5]])
def test_order_that_is_none_or_crosses_a_block_is_refused(order: list[int]) -> None:
    metric = blocks_of(hessian(384))
    with pytest.raises(ValueError, match="refused"):
        feedback(
            weights((5, 384)),
            "tile32-q4-g64-s8",
            metric,
            order=torch.tensor(order, dtype=torch.int32),
        )
