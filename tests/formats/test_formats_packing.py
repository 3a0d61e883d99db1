"""The packings against a second packer, written byte by byte from the text of docs/format.md."""

import random
from typing import Any

import pytest
import torch
from brute_tiles import GROUP_SIZES, brute_pack
from expert_bytes import assemble
from make_vectors import expert_blob, quantized, random_matrix

from formats.errors import FormatError
from formats.expert import ExpertLayout, split
from formats.packing import PACKINGS, packing_named
from formats.tiles import QuantizedMatrix, dequantize, expert_weights, pack, unpack

SHAPES = [(1, 1), (31, 255), (32, 256), (33, 257), (40, 300), (64, 512), (7, 770), (100, 20)]
FIELDS = ("codes", "s", "m", "ds", "dm")

every_packing = pytest.mark.parametrize("name", GROUP_SIZES)


def case_of(
    name: str, rows: int, columns: int, seed: int = 0
) -> tuple[dict[str, Any], QuantizedMatrix]:
    case = random_matrix(name, rows, columns, seed)
    return case, quantized(case)


def packed_by_hand(case: dict[str, Any]) -> bytes:
    return brute_pack(case["packing"], case["codes"], case["s"], case["m"], case["ds"], case["dm"])


def test_packings_are_those_of_the_format_page() -> None:
    assert {name: packing.group_size for name, packing in PACKINGS.items()} == GROUP_SIZES


@every_packing
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_packed_bytes_are_those_of_the_layout_text(name: str, rows: int, columns: int) -> None:
    case, matrix = case_of(name, rows, columns)
    assert pack(matrix, PACKINGS[name]).numpy().tobytes() == packed_by_hand(case)


@every_packing
def test_packed_bytes_of_random_shapes_are_those_of_the_layout_text(name: str) -> None:
    rng = random.Random(name)
    for seed in range(12):
        case, matrix = case_of(name, rng.randint(1, 70), rng.randint(1, 600), seed)
        assert pack(matrix, PACKINGS[name]).numpy().tobytes() == packed_by_hand(case)


@every_packing
def test_unpacking_gives_back_what_was_packed(name: str) -> None:
    rng = random.Random(name)
    shapes = SHAPES + [(rng.randint(1, 100), rng.randint(1, 1000)) for _ in range(10)]
    for seed, (rows, columns) in enumerate(shapes):
        _, matrix = case_of(name, rows, columns, seed)
        back = unpack(pack(matrix, PACKINGS[name]), PACKINGS[name], rows, columns)
        for field in FIELDS:
            assert torch.equal(getattr(back, field), getattr(matrix, field)), (rows, columns, field)


@every_packing
def test_every_tile_is_some_matrix_and_packs_to_itself(name: str) -> None:
    # Every bit of a tile is used, so random bytes survive. Only 0x80 is never written as M.
    packing = PACKINGS[name]
    tiles = torch.randint(
        0, 256, (2, packing.tile_bytes(512)), generator=torch.Generator().manual_seed(0)
    )
    tiles = tiles.to(torch.uint8)
    if packing.scale_bits == 8:
        tiles[tiles == 128] = 129
    matrix = unpack(tiles, packing, 64, 512)
    assert torch.equal(pack(matrix, packing), tiles)


@every_packing
def test_dequantized_weights_are_exact_and_rounded_once(name: str) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        case, matrix = case_of(name, rows, columns, seed)
        group = [column // GROUP_SIZES[name] for column in range(columns)]
        ds, dm = (
            torch.tensor(case["ds"]).double()[:, None],
            torch.tensor(case["dm"]).double()[:, None],
        )
        s, m = torch.tensor(case["s"])[:, group], torch.tensor(case["m"])[:, group]
        exact = ds * s * torch.tensor(case["codes"]) - dm * m
        weights = dequantize(matrix, GROUP_SIZES[name])
        assert weights.dtype == torch.float32
        assert torch.equal(weights, exact.float())


@every_packing
def test_extreme_super_scales_stay_exact(name: str) -> None:
    packing = PACKINGS[name]
    extremes = torch.tensor([65504.0, 6.104e-05, 5.96e-08, 0.0, 1.0009765625], dtype=torch.float16)
    columns = packing.group_size
    codes = (torch.arange(5 * columns) % (packing.max_code + 1)).view(5, columns).to(torch.uint8)
    s = torch.full((5, 1), packing.max_s, dtype=torch.int16)
    m = torch.full((5, 1), packing.min_m or packing.max_m, dtype=torch.int16)
    matrix = QuantizedMatrix(codes, s, m, extremes, extremes.flip(0))
    exact = matrix.ds.double()[:, None] * s * codes - matrix.dm.double()[:, None] * m
    assert torch.equal(dequantize(matrix, columns), exact.float())


@pytest.mark.parametrize(
    ("name", "block_bytes", "expert_bytes", "bits"),
    [
        ("tile32-q2-g16-s4", 2560, 55_181_312, 2.506),
        ("tile32-q2-g16-s8", 3072, 66_191_360, 3.006),
        ("tile32-q3-g32-s4", 3328, 71_696_384, 3.256),
        ("tile32-q3-g64-s8", 3328, 71_696_384, 3.256),
        ("tile32-q4-g64-s8", 4352, 93_716_480, 4.256),
    ],
)
def test_sizes_are_those_of_the_format_page(
    name: str, block_bytes: int, expert_bytes: int, bits: float
) -> None:
    packing = PACKINGS[name]
    assert packing.block_bytes == block_bytes
    layout = ExpertLayout(4096, 14336, packing, packing)
    assert layout.n_bytes == expert_bytes
    assert round(8 * layout.n_bytes / layout.n_weights, 3) == bits
    assert layout.n_bytes % 128 == 0


@every_packing
@pytest.mark.parametrize("field", ["codes", "s", "m"])
def test_value_that_the_packing_cannot_hold_is_refused(name: str, field: str) -> None:
    _, matrix = case_of(name, 2, 300)
    high = {"codes": PACKINGS[name].max_code, "s": PACKINGS[name].max_s, "m": PACKINGS[name].max_m}[
        field
    ]
    getattr(matrix, field)[1, 2] = high + 1
    with pytest.raises(ValueError, match=f"{field} from .* to {high + 1}, the packing holds"):
        pack(matrix, PACKINGS[name])


@every_packing
def test_scales_of_another_shape_are_refused(name: str) -> None:
    _, matrix = case_of(name, 2, 300)
    with pytest.raises(ValueError, match="s of shape"):
        pack(
            QuantizedMatrix(matrix.codes, matrix.s[:, :1], matrix.m, matrix.ds, matrix.dm),
            PACKINGS[name],
        )


@every_packing
def test_tiles_of_another_size_are_refused(name: str) -> None:
    packing = PACKINGS[name]
    with pytest.raises(FormatError, match=rf"tiles of shape \(1, 128\), {name} \[32, 256\] takes"):
        unpack(torch.zeros(1, 128, dtype=torch.uint8), packing, 32, 256)


def test_unknown_packing_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        FormatError, match=r"here: packing 'q5' is unknown; known are tile32-q2-g16-s4, "
    ) as caught:
        packing_named("q5", "here")
    assert caught.value.hint == "update moe-convert"


def test_padding_is_zero() -> None:
    for name, packing in PACKINGS.items():
        _, matrix = case_of(name, 1, 1)
        matrix.codes.fill_(packing.max_code)
        whole = pack(matrix, packing)
        assert int((whole != 0).sum()) <= 8
        rest = unpack(whole, packing, 32, 256)
        assert (
            not rest.codes[1:].any()
            and not rest.codes[:, 1:].any()
            and not rest.ds[1:].any()
            and not rest.dm[1:].any()
        )


def test_expert_is_gate_and_up_tile_by_tile_then_down() -> None:
    layout = ExpertLayout(40, 70, PACKINGS["tile32-q2-g16-s4"], PACKINGS["tile32-q3-g32-s4"])
    gate, up, down = (
        torch.full(shape, value, dtype=torch.uint8)
        for value, shape in ((1, (3, 2688)), (2, (3, 2688)), (3, (2, 128 + 3328)))
    )
    blob = assemble(layout, gate, up, down)
    assert blob.tolist() == ([1] * 2688 + [2] * 2688) * 3 + [3] * (2 * 3456)
    assert [tuple(part.shape) for part in split(layout, blob)] == [(3, 2688), (3, 2688), (2, 3456)]


def test_expert_dequantizes_to_its_three_projections() -> None:
    packing = PACKINGS["tile32-q2-g16-s4"]
    down = PACKINGS["tile32-q3-g64-s8"]
    layout = ExpertLayout(40, 70, packing, down)
    matrices = [
        case_of(*shape, seed)[1]
        for seed, shape in ((51, (packing.name, 70, 40)), (52, (packing.name, 70, 40)))
    ]
    matrices.append(case_of(layout.down.name, 40, 70, 53)[1])
    expected = [
        dequantize(m, p.group_size) for m, p in zip(matrices, (packing, packing, down), strict=True)
    ]
    for found, wanted in zip(expert_weights(layout, expert_blob(layout, 5)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_expert_of_another_size_is_refused() -> None:
    layout = ExpertLayout(40, 70, PACKINGS["tile32-q2-g16-s4"], PACKINGS["tile32-q2-g16-s4"])
    with pytest.raises(FormatError, match=f"expert of 5 bytes, its packings take {layout.n_bytes}"):
        split(layout, torch.zeros(5, dtype=torch.uint8))
