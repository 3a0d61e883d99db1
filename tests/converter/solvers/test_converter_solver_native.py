"""The native solver against the hqq package, and against a reference that gives the same bytes."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hqq.core.quantize import Quantizer
from native_hqq import hqq
from torch import Tensor

from converter.solver_errors import NonFiniteWeightsError
from converter.solvers.hqq_package import quantize_rows, round_scales
from converter.solvers.native import hqq_native, solver_library
from converter.squared_error import SquaredError
from formats.packing import PACKINGS
from formats.tiles import QuantizedMatrix, dequantize, pack, unpack

pytestmark = pytest.mark.skipif(not solver_library.available(), reason=solver_library.describe())

PACKING_NAMES = list(PACKINGS)
ISAS = ["portable", "avx2", "avx512"]
SHAPES = [(33, 192), (192, 384), (1, 16), (40, 300), (17, 1024), (64, 5), (31, 257)]
F32 = np.float32


def weights(kind: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """float32 weights of one of the kinds that KINDS lists."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "gaussian":
        return normal * 0.02
    if kind == "sigma1":  # errors over 0.17: HQQ's shrink operator acts
        return normal
    if kind == "student":
        chi = torch.randn((4, *shape), generator=generator).square().mean(0).sqrt()
        return normal / chi * 0.02
    if kind == "heavy":
        chi = torch.randn((3, *shape), generator=generator).square().mean(0).sqrt()
        return normal / chi
    if kind == "positive":  # M would be negative: it stays at 0 in the nibble packings
        return normal.abs() * 0.02 + 0.01
    if kind == "zeros":  # zero rows between others, and zero groups
        normal[::3] = 0
        normal[:, : shape[1] // 2] *= (torch.arange(shape[0]) % 2)[:, None]
        return normal * 0.02
    if kind == "constant":
        return torch.full(shape, 0.3) * torch.arange(-3, shape[0] - 3)[:, None]
    if kind == "huge":
        return normal * 1e4
    if kind == "tiny":
        return normal * 1e-8
    if kind == "small":  # super-scales are fp16 subnormals
        return normal * 1e-5
    raise ValueError(kind)


KINDS = [
    "gaussian",
    "sigma1",
    "student",
    "heavy",
    "positive",
    "zeros",
    "constant",
    "huge",
    "tiny",
    "small",
]


# ---- the reference: HQQ as converter/native/hqq_group.h defines it, then nearest rounding, in
# numpy's float32 ----


def power_minus_0_3(a: np.ndarray) -> np.ndarray:
    bits = a.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> 23
    f = (bits - (exponent << 23)).view(F32) - F32(1)
    log2 = [
        1.4426950216293335,
        -0.7213473320007324,
        0.48089852929115295,
        -0.36069655418395996,
        0.28855255246162415,
    ]
    log2 += [
        -0.23960812389850616,
        0.20485764741897583,
        -0.19138838350772858,
        0.18476031720638275,
        -0.10749787837266922,
    ]
    p = np.full_like(f, log2[9])
    for c in log2[8::-1]:
        p = p * f + F32(c)
    y = F32(-0.3) * (exponent.astype(F32) + p * f)
    rest = y - np.rint(y)
    exp2 = [1.0, 0.6931471824645996, 0.24022650718688965, 0.05550327152013779, 0.009618056938052177]
    exp2 += [0.0013400427997112274, 0.00015461444854736328]
    p = np.full_like(f, exp2[6])
    for c in exp2[5::-1]:
        p = p * rest + F32(c)
    return (p.view(np.int32) + (np.rint(y).astype(np.int32) << 23)).view(F32)


def reference_groups(w: np.ndarray, nbits: int, round_zero: bool) -> tuple[np.ndarray, np.ndarray]:
    """HQQ's scale and zero of groups w [..., count]."""
    count, limit = w.shape[-1], F32(2**nbits - 1)
    low, span = w.min(-1), w.max(-1) - w.min(-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(span > F32(1e-4), (F32(1) / span) * limit, F32(1))
    inverse = np.minimum(inverse, F32(2e4))
    zero = -low * inverse
    if round_zero:
        zero = np.rint(zero)
    t = w * inverse[..., None]
    sums = [np.zeros_like(low) for _ in range(4)]
    for c in range(count):
        sums[c % 4] = sums[c % 4] + t[..., c]
    t_sum = (sums[0] + sums[1]) + (sums[2] + sums[3])
    for _ in range(20):
        x = t + zero[..., None]
        q = np.rint(np.clip(x, 0, limit))
        worst = np.abs(q - x).max(-1)
        need = (span > F32(0.16)) & (worst > F32(0.16) * inverse)
        shrunk = np.zeros_like(low)
        if need.any():
            error = w - (q - zero[..., None]) / inverse[..., None]
            size = np.abs(error)
            smaller = np.maximum(
                size - F32(0.1) * power_minus_0_3(np.maximum(size, F32(0.1))), F32(0)
            )
            moved = np.where(
                size > F32(0.1695), np.copysign(smaller, error) * inverse[..., None], F32(0)
            )
            for c in range(count):
                shrunk = shrunk + moved[..., c]
            shrunk = np.where(need, shrunk, F32(0))
        zero = (q.sum(-1, dtype=F32) - (t_sum - shrunk)) * (F32(1) / F32(count))
    return F32(1) / inverse, zero


def reference_hqq(
    weight: Tensor, nbits: int, group_size: int, round_zero: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """HQQ's scale and zero, float32 [rows, groups]; the last group may be short."""
    w = weight.float().numpy()
    whole = w.shape[1] // group_size * group_size
    parts = [w[:, :whole].reshape(len(w), -1, group_size), w[:, None, whole:]]
    results = [reference_groups(part, nbits, round_zero) for part in parts if part.size]
    return np.concatenate([r[0] for r in results], 1), np.concatenate([r[1] for r in results], 1)


def reference_matrix(weight: Tensor, name: str) -> QuantizedMatrix:
    """The torch path's rounding of the reference's scale and zero; a group with one code has no
    scale.
    """
    p = PACKINGS[name]
    scale, zero = (torch.from_numpy(x) for x in reference_hqq(weight, p.nbits, p.group_size))
    w = torch.nn.functional.pad(weight, (0, -weight.shape[1] % p.group_size)).view(
        len(weight), -1, p.group_size
    )
    codes = (w * (1 / scale)[..., None] + zero[..., None]).round().clamp(0, p.max_code)
    existing = torch.arange(codes.shape[1] * p.group_size).view(-1, p.group_size) < weight.shape[1]
    low = torch.where(existing, codes, torch.inf).amin(2)
    one = low == torch.where(existing, codes, -torch.inf).amax(2)
    return round_scales(
        weight, torch.where(one, 0, scale), torch.where(one, scale * (zero - low), scale * zero), p
    )


def quantize(weight: Tensor, name: str, **options) -> tuple[Tensor, SquaredError]:
    p = PACKINGS[name]
    tiles = -(-weight.shape[0] // 32)
    out = torch.full((tiles * p.tile_bytes(weight.shape[1]),), 0xA5, dtype=torch.uint8)
    error = hqq_native.quantize_matrix(weight, name, out, **options)
    return out.view(tiles, -1), error


def usable(isa: str) -> bool:
    try:
        quantize(torch.ones(1, 16), PACKING_NAMES[0], isa=isa)
    except solver_library.NativeSolverError:
        return False
    return True


# ---- the hqq package ----


@pytest.mark.parametrize("kind", ["gaussian", "student", "sigma1", "heavy"])
@pytest.mark.parametrize("nbits, group_size", [(2, 16), (3, 32), (3, 64), (4, 64)])
def test_codes_are_those_of_the_hqq_package(kind: str, nbits: int, group_size: int) -> None:
    w = weights(kind, (256, 512))
    options = {"nbits": nbits, "group_size": group_size, "round_zero": nbits == 4}
    codes, meta = Quantizer.quantize(
        w, axis=1, optimize=True, bitpack=False, device="cpu", **options
    )
    theirs = w - ((codes - meta["zero"]) * meta["scale"]).view(w.shape)
    ours = hqq(w, nbits, group_size, round_zero=nbits == 4)
    groups = ours.codes.view(256, -1, group_size).float()
    error = w - ((groups - ours.zero[..., None]) * ours.scale[..., None]).view(w.shape)
    assert torch.equal(ours.scale.view(-1), meta["scale"].view(-1))
    # Sums of floats in another order: a weight between two codes may fall to the other side.
    assert (ours.codes.view(-1) != codes.view(-1)).float().mean() < 1e-4
    assert error.abs().mean() == pytest.approx(theirs.abs().mean().item(), rel=1e-3)
    assert error.norm() == pytest.approx(theirs.norm().item(), rel=1e-3)


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("kind", ["gaussian", "student", "positive", "zeros"])
def test_bytes_are_those_of_the_torch_path_but_for_ties(kind: str, name: str) -> None:
    w = weights(kind, (64, 512))
    matrix, theirs = quantize_rows(w, PACKINGS[name])
    tiles, ours = quantize(w, name)
    assert (tiles != pack(matrix, PACKINGS[name])).float().mean() < 1e-3
    assert ours.error == pytest.approx(theirs.error, rel=1e-3)
    assert ours.total == pytest.approx(theirs.total, rel=1e-12)


# ---- the reference ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbits, group_size", [(2, 16), (3, 32), (3, 64), (4, 64)])
def test_scale_and_zero_are_those_of_the_reference(kind: str, nbits: int, group_size: int) -> None:
    for shape in SHAPES:
        w = weights(kind, shape)
        scale, zero = reference_hqq(w, nbits, group_size, round_zero=nbits == 4)
        ours = hqq(w, nbits, group_size, round_zero=nbits == 4)
        assert np.array_equal(ours.scale.numpy(), scale)
        assert np.array_equal(ours.zero.numpy(), zero)


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_the_plain_rounding_of_hqq(kind: str, name: str) -> None:
    p = PACKINGS[name]
    for shape in SHAPES:
        w = weights(kind, shape)
        assert torch.equal(quantize(w, name)[0], pack(reference_matrix(w, name), p)), shape


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_of_16_bit_weights_are_those_of_the_same_weights_in_float32(
    name: str, dtype: torch.dtype
) -> None:
    for kind in ("gaussian", "tiny", "small"):  # in fp16 the last two are subnormals
        for isa in filter(usable, ISAS):
            w = weights(kind, (40, 300)).to(dtype)
            assert torch.equal(quantize(w, name, isa=isa)[0], quantize(w.float(), name, isa=isa)[0])


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("refit", [False, True])
def test_every_isa_gives_the_same_bytes_and_errors(name: str, refit: bool) -> None:
    for kind in KINDS:
        for shape in SHAPES:
            w = weights(kind, shape)
            expected = quantize(w, name, refit=refit, isa="portable")
            for isa in filter(usable, ISAS[1:]):
                tiles, error = quantize(w, name, refit=refit, isa=isa)
                assert torch.equal(tiles, expected[0]), (kind, shape, isa)
                assert error == expected[1]


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("refit", [False, True])
def test_error_is_that_of_the_unpacked_weights(name: str, refit: bool) -> None:
    for shape in SHAPES:
        w = weights("gaussian", shape).to(torch.bfloat16)
        tiles, error = quantize(w, name, refit=refit)
        back = dequantize(unpack(tiles, PACKINGS[name], *shape), PACKINGS[name].group_size)
        assert error.error == pytest.approx(
            (w.double() - back.double()).square().sum().item(), rel=1e-6
        )
        assert error.total == pytest.approx(w.double().square().sum().item(), rel=1e-12)


# ---- refit ----


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_refit_does_not_raise_the_error(kind: str, name: str) -> None:
    w = weights(kind, (64, 1024))
    plain, refitted = quantize(w, name)[1], quantize(w, name, refit=True)[1]
    assert refitted.error <= plain.error * (1 + 1e-6)
    part = {2: 0.86, 3: 0.93, 4: 0.97}[PACKINGS[name].nbits]
    if kind in ("gaussian", "student"):
        assert refitted.error < part * plain.error


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_refit_keeps_a_row_with_one_constant_group(name: str) -> None:
    # HQQ gives such a group the scale 1, beside which the other groups' scales round to 0.
    w = weights("gaussian", (32, 512))
    w[:, :64] = 0.01
    error = quantize(w, name, refit=True)[1]
    assert error.error < 0.12 * error.total


# ---- parts, threads, layout ----


@pytest.mark.parametrize("name", PACKING_NAMES)
@pytest.mark.parametrize("refit", [False, True])
def test_tile_ranges_on_two_threads_give_the_bytes_and_error_of_one_call(
    name: str, refit: bool
) -> None:
    w = weights("student", (5 * 32 - 7, 520)).to(torch.bfloat16)
    whole, error = quantize(w, name, refit=refit)
    out = torch.zeros_like(whole)

    def part(ends: tuple[int, int]) -> Tensor:
        to = out[ends[0] : ends[1]].view(-1)
        return hqq_native.quantize_tiles(
            w, name, to, tile_begin=ends[0], tile_end=ends[1], refit=refit
        )

    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(part, [(0, 1), (1, 1), (1, 4), (4, 5)]))
    assert torch.equal(out, whole)
    assert hqq_native.summed_over_tiles(errors) == error


@pytest.mark.parametrize("name", PACKING_NAMES)
def test_gate_and_up_interleave_tile_by_tile(name: str) -> None:
    gate, up = weights("gaussian", (70, 300)), weights("gaussian", (70, 300), seed=1)
    tile_bytes = PACKINGS[name].tile_bytes(300)
    out = torch.full((6 * tile_bytes,), 7, dtype=torch.uint8)
    hqq_native.quantize_matrix(gate, name, out, stride_tiles=2)
    assert (out.view(6, -1)[1::2] == 7).all()
    hqq_native.quantize_matrix(up, name, out[tile_bytes:], stride_tiles=2)
    assert torch.equal(out.view(6, -1)[::2], quantize(gate, name)[0])
    assert torch.equal(out.view(6, -1)[1::2], quantize(up, name)[0])


# ---- refusals ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_weights_are_refused_with_their_number(dtype: torch.dtype, isa: str) -> None:
    if not usable(isa):
        pytest.skip(f"no {isa} here")
    w = weights("gaussian", (70, 300)).to(dtype)
    w[0, 0], w[33, 299], w[69, 5] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(NonFiniteWeightsError, match="3 weights are infinite or NaN") as caught:
        quantize(w, PACKING_NAMES[0], isa=isa)
    assert caught.value.count == 3


@pytest.mark.parametrize("refit", [False, True])
def test_weights_beyond_fp16_super_scales_are_refused(refit: bool) -> None:
    for name in PACKING_NAMES:
        for factor in (1e8, 1e38):
            with pytest.raises(solver_library.ScaleOverflowError):
                quantize(weights("sigma1", (16, 64)).clamp(-3, 3) * factor, name, refit=refit)


def test_wrong_tensors_are_refused() -> None:
    name, w = PACKING_NAMES[0], weights("gaussian", (32, 256))
    out = torch.zeros(PACKINGS[name].tile_bytes(256), dtype=torch.uint8)
    wrong = [
        (w.double(), out, {}),
        (w[0], out, {}),
        (w.t(), out, {}),
        (w[:0], out, {}),
        (w, out[:-1], {}),
        (w, out.view(torch.int8), {}),
        (w, out.view(1, -1), {}),
        (w, out, {"tile_end": 2}),
        (w, out, {"tile_begin": 1, "tile_end": 0}),
        (w, out, {"stride_tiles": 0}),
    ]
    for weight, to, options in wrong:
        with pytest.raises(ValueError):
            hqq_native.quantize_tiles(weight, name, to, **options)
    with pytest.raises(ValueError):
        hqq(w, 5, 16)


def test_describe_names_the_isa_and_the_library() -> None:
    assert solver_library.LIBRARY in solver_library.describe()
    assert any(isa in solver_library.describe() for isa in ISAS)
