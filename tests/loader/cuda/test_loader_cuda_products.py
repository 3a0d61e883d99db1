"""The CUDA products, run on the CPU (tests/support/gpu/cuda_host), give the CPU kernels' bits."""

import re

import pytest
import torch
from cuda_host import COMPILER, launch_on_host
from project_paths import ROOT

from formats.expert import ExpertLayout
from formats.packing import BLOCK_COLUMNS, HEAD_BYTES, PACKINGS, TILE_ROWS
from formats.tiles import QuantizedMatrix, pack
from loader.arithmetic import kernels
from loader.arithmetic.native_backend import NativeBackend
from loader.cuda.products import pairs
from loader.cuda.products.packed_products import Products
from loader.cuda.products.structures import LinearMatrix

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not kernels.available(), reason="compares with the native CPU kernels"),
]

NAMES = list(PACKINGS)
ORDERS = (0, 1, 2)
Q2, Q3, Q4 = (PACKINGS[f"tile32-{name}"] for name in ("q2-g16-s4", "q3-g32-s4", "q4-g64-s8"))


class HostDevice:
    """Runs launches at once on this CPU.

    order: order of a kernel's threads. defines: macros of the kernels' build.
    """

    torch_device = torch.device("cpu")

    def __init__(self, order=0, defines=()):
        self.order, self.defines = order, defines
        self.launched = []

    def launch(self, kernel, grid, threads, args, *, shared_bytes=0, reads=(), writes=()):
        self.launched.append(kernel)
        launch_on_host(kernel, grid, threads, args, shared_bytes, self.order, self.defines)

    def prepare(self, kernel, grid, threads, args, **kwargs):
        return lambda: self.launch(kernel, grid, threads, args, **kwargs)


def random_tiles(packing, rows, columns, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16)

    groups = -(-columns // packing.group_size)
    return pack(
        QuantizedMatrix(
            integers(0, packing.max_code, rows, columns).to(torch.uint8),
            integers(0, packing.max_s, rows, groups),
            integers(packing.min_m, packing.max_m, rows, groups),
            torch.rand(rows, generator=generator).half(),
            torch.rand(rows, generator=generator).half(),
        ),
        packing,
    )


def random_expert(layout, seed):
    gate, up = (
        random_tiles(layout.gate_up, layout.intermediate, layout.hidden, seed + i)
        for i in (100, 200)
    )
    down = random_tiles(layout.down, layout.hidden, layout.intermediate, seed)
    return torch.cat([torch.stack([gate, up], dim=1).flatten(), down.flatten()])


def activations(tokens, columns, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def routed(tokens, experts, top_k):
    """Return a router's choice: index int64 and weights float32, [tokens, top_k]."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    weights, index = scores.softmax(1).topk(top_k, dim=1)
    return index, weights.contiguous()


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30))


def linear(device, x, tiles, packing, rows):
    products = Products(device)
    return products.linear(products.quantize(x), tiles, packing, rows, x.shape[1])


def both_experts(layouts, blobs, x, index, weights, device):
    """Return the experts' sum by the CPU kernels and by the CUDA kernels; both begin from ones."""
    cpu, cuda = torch.ones_like(x), torch.ones_like(x)
    NativeBackend().experts(blobs, layouts, x, index, weights, cpu)
    Products(device).add_experts(blobs, layouts, x, index, weights, cuda)
    return cpu, cuda


def test_constants_are_those_of_the_format():
    text = (ROOT / "loader/cuda/kernels/tiles.cuh").read_text()
    numbers = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    assert (numbers["kTileRows"], numbers["kBlockCols"], numbers["kHeadBytes"]) == (
        str(TILE_ROWS), str(BLOCK_COLUMNS), str(HEAD_BYTES),
    )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_few_tokens_have_the_cpus_bits(name, tokens, order):
    # Several rounds of superblocks for each number of warps; the last round is not full.
    packing, rows, columns = PACKINGS[name], 72, 2500
    tiles, x = random_tiles(packing, rows, columns), activations(tokens, columns)
    assert same_bits(
        linear(HostDevice(order), x, tiles, packing, rows), kernels.linear(x, tiles, name, rows)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [9, 33])
def test_many_tokens_have_the_cpus_bits(name, tokens, order):
    packing, rows, columns = PACKINGS[name], 168, 700
    tiles, x = random_tiles(packing, rows, columns), activations(tokens, columns)
    assert same_bits(
        linear(HostDevice(order), x, tiles, packing, rows), kernels.linear(x, tiles, name, rows)
    )


@pytest.mark.parametrize("name", NAMES)
def test_many_tokens_without_tensor_cores_have_the_cpus_bits(name):
    packing, rows, columns = PACKINGS[name], 40, 300
    tiles, x = random_tiles(packing, rows, columns), activations(13, columns)
    device = HostDevice(defines=("MOE_NO_TENSOR_CORES",))
    assert same_bits(linear(device, x, tiles, packing, rows), kernels.linear(x, tiles, name, rows))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows,columns", [(1, 1), (31, 64), (33, 256), (64, 257), (130, 321)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 64])
def test_any_shape_has_the_cpus_bits(name, rows, columns, tokens):
    packing = PACKINGS[name]
    tiles, x = random_tiles(packing, rows, columns), activations(tokens, columns)
    assert same_bits(
        linear(HostDevice(), x, tiles, packing, rows), kernels.linear(x, tiles, name, rows)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [4, 12])
def test_values_that_are_not_finite_spoil_their_own_token_only(name, tokens):
    packing, rows, columns = PACKINGS[name], 40, 320
    tiles, x = random_tiles(packing, rows, columns), activations(tokens, columns)
    x[0, 100], x[1, 319], x[2] = float("nan"), float("-inf"), 0.0
    y = linear(HostDevice(), x, tiles, packing, rows)
    assert y[:2].isnan().all() and not y[2:].isnan().any()
    assert same_bits(y, kernels.linear(x, tiles, name, rows))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [2, 10])
def test_largest_integers_have_the_cpus_bits(name, tokens):
    packing, rows, columns = PACKINGS[name], 32, 256
    ones = torch.ones(rows, columns // packing.group_size, dtype=torch.int16)
    codes = torch.full((rows, columns), packing.max_code, dtype=torch.uint8)
    scale = torch.ones(rows, dtype=torch.float16)
    tiles = pack(
        QuantizedMatrix(codes, packing.max_s * ones, packing.max_m * ones, scale, scale), packing
    )
    x = torch.ones(tokens, columns)
    x[1] = -1
    assert same_bits(
        linear(HostDevice(), x, tiles, packing, rows), kernels.linear(x, tiles, name, rows)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_are_quantized_like_their_float32(dtype):
    products, x = Products(HostDevice()), activations(3, 200).to(dtype)
    assert torch.equal(products.quantize(x), products.quantize(x.float()))


def test_no_tokens_are_no_launches():
    device = HostDevice()
    assert linear(device, torch.zeros(0, 300), random_tiles(Q2, 40, 300), Q2, 40).shape == (0, 40)
    assert not device.launched


@pytest.mark.parametrize(
    "packings,launches", [((Q2, Q2, Q2), 1), ((Q3, Q2, Q3), 2), ((Q4,) * 5, 2)]
)
def test_matrices_of_one_token_take_one_launch_a_packing(packings, launches):
    device, columns = HostDevice(), 320
    products, x = Products(device), activations(1, columns)
    acts = torch.zeros_like(products.quantize(x))
    matrices = [
        LinearMatrix(random_tiles(packing, rows, columns, rows), packing, rows, torch.empty(rows))
        for packing, rows in zip(packings, (96, 33, 40, 8, 64), strict=False)
    ]
    run = products.prepare_linear(acts, matrices, columns)
    acts.copy_(products.quantize(x))
    device.launched.clear()
    run()
    assert len(device.launched) == launches
    for m in matrices:
        assert same_bits(m.y, kernels.linear(x, m.tiles, m.packing.name, m.rows)[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gate_up,down", [*zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)])
@pytest.mark.parametrize("tokens", [1, 12])
def test_experts_have_the_cpus_bits(gate_up, down, tokens, order):
    layout = ExpertLayout(600, 168, PACKINGS[gate_up], PACKINGS[down])
    layouts = dict.fromkeys(range(4), layout)
    index, weights = routed(tokens, 4, 3)
    blobs = {expert: random_expert(layout, expert) for expert in set(index.flatten().tolist())}
    # Small values, so that silu is neither 0 nor the identity.
    x = activations(tokens, layout.hidden) / 1000
    assert same_bits(*both_experts(layouts, blobs, x, index, weights, HostDevice(order)))


@pytest.mark.parametrize("hidden,intermediate", [(32, 32), (33, 65), (256, 257), (100, 350)])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_experts_of_any_shape_have_the_cpus_bits(hidden, intermediate, tokens):
    layout = ExpertLayout(hidden, intermediate, Q2, Q3)
    index, weights = routed(tokens, 3, 2)
    blobs = {expert: random_expert(layout, expert) for expert in set(index.flatten().tolist())}
    x = activations(tokens, hidden) / 1000
    if tokens > 1:
        x[1, 3] = float("inf")
    assert same_bits(
        *both_experts(dict.fromkeys(range(3), layout), blobs, x, index, weights, HostDevice())
    )


@pytest.mark.parametrize("tokens", [1, 20])
def test_experts_of_several_packings_are_summed_in_ascending_order(tokens):
    kinds = [ExpertLayout(64, 96, Q2, Q2), ExpertLayout(64, 96, Q4, Q3)]
    layouts = {expert: kinds[expert in (1, 4)] for expert in range(12)}
    index, weights = routed(tokens, 12, 10)
    blobs = {
        expert: random_expert(layouts[expert], expert) for expert in set(index.flatten().tolist())
    }
    assert same_bits(
        *both_experts(layouts, blobs, activations(tokens, 64) / 100, index, weights, HostDevice())
    )


def test_many_pairs_take_several_passes_and_have_the_same_bits(monkeypatch):
    layout, device = ExpertLayout(64, 64, Q2, Q4), HostDevice()
    index, weights = routed(30, 4, 2)
    blobs = {expert: random_expert(layout, expert) for expert in range(4)}
    monkeypatch.setattr(pairs, "MAX_PAIRS", 10)
    assert same_bits(
        *both_experts(
            dict.fromkeys(range(4), layout),
            blobs,
            activations(30, 64) / 100,
            index,
            weights,
            device,
        )
    )
    assert device.launched.count("add_pairs") >= 6


def test_calls_over_ascending_parts_have_the_bits_of_one_call():
    layout, products = ExpertLayout(64, 64, Q3, Q3), Products(HostDevice())
    layouts, x = dict.fromkeys(range(6), layout), activations(9, 64) / 100
    index, weights = routed(9, 6, 3)
    blobs = {expert: random_expert(layout, expert) for expert in layouts}
    once, parts = torch.zeros(2, 9, 64)
    products.add_experts(blobs, layouts, x, index, weights, once)
    for some in ((0, 2), (3,), (4, 5)):
        products.add_experts(
            {expert: blobs[expert] for expert in some}, layouts, x, index, weights, parts
        )
    without_1 = {expert: blob for expert, blob in blobs.items() if expert != 1}
    expected = torch.zeros(9, 64)
    NativeBackend().experts(without_1, layouts, x, index, weights, expected)
    assert torch.equal(parts, expected) and not torch.equal(parts, once)


def test_one_tokens_experts_a_few_at_a_time_have_the_bits_of_all_at_once():
    layout, products = ExpertLayout(64, 96, Q2, Q4), Products(HostDevice())
    blobs = [random_expert(layout, expert) for expert in range(10)]
    x, weights = (
        activations(1, 64) / 100,
        torch.rand(10, generator=torch.Generator().manual_seed(1)),
    )
    once, parts = torch.full((2, 64), float("nan"))
    products.token_experts(layout, products.quantize(x), weights, once).add(
        [*enumerate(blobs)], first=True
    )
    some = products.token_experts(layout, products.quantize(x), weights, parts)
    some.add([(0, blobs[0])], first=True)
    some.add([])
    some.add([*enumerate(blobs)][1:])
    expected = torch.zeros(1, 64)
    index = torch.arange(10)[None]
    NativeBackend().experts(
        dict(enumerate(blobs)), dict.fromkeys(range(10), layout), x, index, weights[None], expected
    )
    assert torch.equal(once, expected[0]) and torch.equal(parts, expected[0])


def test_no_experts_at_all_leave_zeros():
    layout, products = ExpertLayout(64, 96, Q2, Q4), Products(HostDevice())
    out = torch.ones(64)
    products.token_experts(layout, products.quantize(torch.ones(1, 64)), torch.ones(2), out).add(
        [], first=True
    )
    assert not out.any()


LAYOUT = ExpertLayout(64, 64, Q2, Q2)
BLOB = torch.zeros(LAYOUT.n_bytes, dtype=torch.uint8)
ACTS = torch.zeros(1, 4, 80, dtype=torch.uint8)
TILES = torch.zeros(Q2.matrix_bytes(64, 64), dtype=torch.uint8)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda p: p.quantize(torch.zeros(2, 64, dtype=torch.float64)), "x: expected float32"),
        (lambda p: p.quantize(torch.zeros(64, 2).T), "x: expected dense"),
        (lambda p: p.linear(ACTS, TILES[:-1], Q2, 64, 64), "tiles: 5375 bytes, 5376 needed"),
        (lambda p: p.linear(ACTS, TILES, Q2, 64, 257), "acts: 257 columns take"),
        (lambda p: p.linear(ACTS, torch.zeros(6000, dtype=torch.uint8)[1:], Q2, 64, 64), "address"),
        (
            lambda p: p.prepare_linear(ACTS.expand(2, 4, 80).contiguous(), [], 64),
            "expected one token, got 2",
        ),
        (
            lambda p: p.prepare_linear(ACTS, [LinearMatrix(TILES, Q2, 64, torch.zeros(63))], 64),
            "y: expected 64 rows",
        ),
        (lambda p: p.token_experts(LAYOUT, ACTS, torch.ones(2), torch.zeros(63)), "out: expected"),
        (
            lambda p: p.token_experts(LAYOUT, ACTS, torch.ones(2), torch.zeros(64)).add(
                [(2, BLOB)]
            ),
            "rank 2",
        ),
        (
            lambda p: p.token_experts(LAYOUT, ACTS, torch.ones(2), torch.zeros(64)).add(
                [(1, BLOB[16:])]
            ),
            "blob: ",
        ),
        (lambda p: add(p, x=torch.zeros(2, 65)), "out: expected"),
        (lambda p: add(p, index=torch.zeros(2, 1, dtype=torch.int32)), "index: expected dense"),
        (lambda p: add(p, weights=torch.zeros(2, 2)), "weights"),
        (lambda p: add(p, blob=BLOB[16:]), "blob: "),
    ],
)
def test_wrong_arguments_are_refused_before_a_launch(call, message):
    device = HostDevice()
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Products(device))
    assert not device.launched


def add(products, x=None, index=None, weights=None, blob=BLOB):
    x = torch.zeros(2, 64) if x is None else x
    index = torch.zeros(2, 1, dtype=torch.int64) if index is None else index
    weights = torch.zeros(2, 1) if weights is None else weights
    products.add_experts({0: blob}, {0: LAYOUT}, x, index, weights, torch.zeros(2, 64))
