"""The kernels between the products of one token, run on this CPU, give the native code's bits."""

import copy

import pytest
import torch
from cuda_host import COMPILER, KERNELS
from inside import inside
from native_attention import NativeAttention
from random_weights import random_tiles
from recording_device import RecordingDevice

from loader.arithmetic import kernels
from loader.arithmetic.kernels import PackedMatrix
from loader.cuda.decode import gpu_layer, output_head
from loader.cuda.decode.argument_structures import KvPlace
from loader.cuda.decode.gpu_layer import SUFFIXES, Launches
from loader.cuda.decode.token_memory import SPAN, Sizes, TokenMemory
from loader.cuda.products.packed_products import Products
from loader.decode.weights import AttentionWeights
from loader.hf.growing_cache import GrowingLayer

pytestmark = pytest.mark.skipif(
    not kernels.available() or COMPILER is None, reason="not built, or no C++ compiler"
)

DTYPES = [torch.float32, torch.bfloat16]
ORDERS = [0, 1, 2]
"""Orders of a kernel's threads.

Each uses other numbers, so that shared memory left by the previous run cannot hide an error.
"""
EPS = 1e-5


def sizes(dtype, hidden=192, heads=6, kv_heads=2, head_dim=32, experts=8, top_k=2):
    return Sizes(dtype, hidden, heads, kv_heads, head_dim, experts, top_k, head_dim**-0.5)


def made(dtype, order=0, **numbers):
    """Return (device, launches, memory) for these sizes; kernels run threads in this order."""
    device = RecordingDevice()
    device.thread_order = order
    memory = TokenMemory(device, sizes(dtype, **numbers))
    return device, Launches(device, sizes(dtype, **numbers), memory), memory


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("attention", "kSpan", SPAN),
        ("attention", "kHeads", inside(gpu_layer, "HEADS")),
        ("attention", "kMaxDim", gpu_layer.MAX_HEAD_DIM),
        ("attention", "kAttendThreads", inside(gpu_layer, "ATTEND_THREADS")),
        ("norm", "kNormThreads", inside(gpu_layer, "NORM_THREADS")),
        ("router", "kRouteThreads", inside(gpu_layer, "ROUTE_THREADS")),
        ("head", "kHeadThreads", inside(output_head, "HEAD_THREADS")),
    ],
)
def test_launches_have_the_sizes_that_the_kernels_were_written_for(file, name, value):
    assert f"constexpr int {name} = {value};" in (KERNELS / f"{file}.cuh").read_text()


def quantized(device, x):
    acts = torch.empty(1, -(-x.numel() // 256) * 4, 80, dtype=torch.uint8)
    device.launch(
        f"quantize_{SUFFIXES[x.dtype]}", (-(-acts.shape[1] // 8), 1, 1), 128, (x, x.numel(), acts)
    )
    return acts


def exact_norm(x, weight):
    """Return the RMSNorm with a float64 sum, for any dtype; roundings as in docs/numerics.md."""
    factor = (1 / (x.double().square().mean() + EPS).sqrt()).float()
    return (weight.float() * (x.float() * factor).to(x.dtype).float()).to(x.dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hidden", [64, 192, 1348, 4096])
@pytest.mark.parametrize("dtype", SUFFIXES)
def test_the_residual_sum_and_its_norm_are_the_cpus(dtype, hidden, order):
    torch.manual_seed(10 * hidden + order)
    device, launches, memory = made(dtype, order, hidden=hidden)
    x, weight = torch.randn(hidden).to(dtype), torch.rand(hidden).to(dtype)
    added = torch.randn(hidden)
    total = torch.empty_like(x)
    launches.add_norm(x, added, weight, EPS, total)()
    assert torch.equal(total, (x.float() + added.to(dtype).float()).to(dtype))
    assert torch.equal(memory.normed, exact_norm(total, weight))
    assert torch.equal(memory.acts, quantized(device, memory.normed))


def test_the_first_layer_takes_its_input_as_it_is():
    _, launches, memory = made(torch.bfloat16)
    table, total = torch.randn(5, 192).bfloat16(), torch.empty(192, dtype=torch.bfloat16)
    weight = torch.ones(192).bfloat16()
    run = launches.add_norm(memory.row, None, weight, EPS, total)
    for token in (3, 1):
        memory.row.value = table[token].data_ptr()
        run()
        assert torch.equal(total, table[token])
        assert torch.equal(memory.normed, exact_norm(table[token], weight))


def attention_weights(hidden, heads, kv_heads, dim):
    def matrix(rows, columns):
        return PackedMatrix(random_tiles(-(-rows // 32) * 32, columns), "tile32-q4-g64-s8", rows)

    shapes = (
        (heads * dim, hidden),
        (kv_heads * dim, hidden),
        (kv_heads * dim, hidden),
        (hidden, heads * dim),
    )
    return AttentionWeights(*(matrix(*shape) for shape in shapes))


def cache_of(length, kind):
    heads, dim, dtype, _ = kind
    past = GrowingLayer()
    if length:
        past.update(*(torch.randn(1, heads, length, dim).to(dtype) for _ in range(2)))
    return past


@torch.inference_mode()
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "length"),
    [
        (4, 2, 32, 0),
        (4, 2, 32, 63),
        (4, 2, 32, 64),
        (6, 2, 32, 511),
        (4, 1, 16, 512),
        (6, 1, 64, 90),
        (4, 2, 32, 1100),
        (2, 2, 256, 130),
        (9, 3, 128, 70),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_any_number_of_positions_is_the_cpus(
    dtype, heads, kv_heads, dim, length, order
):
    hidden = 64
    torch.manual_seed(10 * length + order)
    device, launches, memory = made(
        dtype, order, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=dim
    )
    weights = attention_weights(hidden, heads, kv_heads, dim)
    cpu = NativeAttention(weights, hidden, dim, dim**-0.5, dtype)
    ours = cache_of(length, cpu.kind)
    theirs = copy.deepcopy(ours)
    x = torch.randn(1, 1, hidden).to(dtype)
    cos, sin = torch.randn(1, 1, dim).to(dtype), torch.randn(1, 1, dim).to(dtype)

    place = ours.place(cpu.kind)
    memory.heads.position = length
    memory.heads.cos = cos.data_ptr()
    memory.heads.sin = sin.data_ptr()
    memory.set_spans(length // SPAN + 1)
    for name, y in (("q", memory.q), ("k", memory.k), ("v", memory.v)):
        matrix = getattr(weights, name)
        y.copy_(kernels.linear(x[0].float(), matrix.tiles, matrix.packing, matrix.rows)[0])
    launches.attend(KvPlace(*place))()
    launches.combine()()
    ours.show(length + 1)

    assert torch.equal(run_o(device, memory, weights.o), cpu.append(x, cos, sin, theirs)[0, 0])
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def run_o(device, memory, matrix):
    """Return the product of o with the mixed values, rounded to the activations' dtype."""
    matrices = [gpu_layer.linear_matrix(matrix, memory.o)]
    Products(device).prepare_linear(memory.mixed, matrices, memory.q.numel())()
    return memory.o.to(memory.x.dtype)


@torch.inference_mode()
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "length"), [(4, 2, 32, 70), (4, 1, 64, 600)])
def test_attention_in_float16_differs_from_float64_by_rounding(heads, kv_heads, dim, length):
    torch.manual_seed(0)
    _, launches, memory = made(
        torch.float16, hidden=64, heads=heads, kv_heads=kv_heads, head_dim=dim
    )
    kind = kv_heads, dim, torch.float16, torch.device("cpu")
    past = cache_of(length, kind)
    place = past.place(kind)
    cos, sin = torch.ones(dim).half(), torch.zeros(dim).half()
    memory.heads.position = length
    memory.heads.cos = cos.data_ptr()
    memory.heads.sin = sin.data_ptr()
    memory.set_spans(length // SPAN + 1)
    for y in (memory.q, memory.k, memory.v):
        y.copy_(torch.randn(y.shape))
    launches.attend(KvPlace(*place))()
    launches.combine()()
    past.show(length + 1)
    assert torch.equal(past.keys[0, :, -1].flatten(), memory.k.half())
    assert torch.equal(past.values[0, :, -1].flatten(), memory.v.half())
    expected = torch.nn.functional.scaled_dot_product_attention(
        memory.q.double().view(1, heads, 1, dim),
        past.keys.double(),
        past.values.double(),
        enable_gqa=True,
    ).flatten()
    spans, acc, total = memory.spans, memory.acc, memory.total
    if spans == 1:
        assert (
            acc[: heads * dim].view(heads, dim) / total[:heads, None] - expected.view(heads, dim)
        ).abs().max() < 1e-5
    assert (dequantized(memory.mixed)[: heads * dim] - expected).norm() < 0.01 * expected.norm()


def dequantized(acts):
    """Return the float values of int8 activations."""
    return (
        acts[0, :, :64].view(torch.int8) * acts[0, :, 72:76].contiguous().view(torch.float32)
    ).flatten()


def cpu_logits(x, router):
    """Return a router's rounded logits, summed as in the native code."""
    if x.dtype is torch.bfloat16:
        return kernels.linear_bf16(x.float()[None], router)[0].to(x.dtype)
    return (router.double() @ x.double()).to(torch.float32).to(x.dtype)


def run_route(memory, launches, router, ahead=None, guesses=0):
    memory.guess.set(None if ahead is None else (ahead, guesses))
    launches.route(router)()
    return memory.choice.tolist(), memory.weights.clone()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden"), [(8, 2, 192), (4, 2, 68), (40, 5, 256), (3, 3, 64)]
)
@pytest.mark.parametrize("dtype", SUFFIXES)
def test_the_largest_of_a_routers_logits_are_chosen_and_of_the_next_ones_guessed(
    dtype, experts, top_k, hidden, order
):
    torch.manual_seed(10 * experts + order)
    _, launches, memory = made(dtype, order, hidden=hidden, experts=experts, top_k=top_k)
    memory.normed.copy_(torch.randn(hidden).to(dtype))
    router, ahead = (torch.randn(experts, hidden).to(dtype) for _ in range(2))
    choice, weights = run_route(memory, launches, router, ahead, 2)
    logits, next_logits = (cpu_logits(memory.normed, w).float() for w in (router, ahead))
    ranked = sorted(range(experts), key=lambda e: (-logits[e], e))
    assert choice[:top_k] == ranked[:top_k]
    assert (
        choice[top_k : top_k + 2] == sorted(range(experts), key=lambda e: (-next_logits[e], e))[:2]
    )
    shares = logits.double().softmax(0)[ranked[:top_k]]
    assert torch.allclose(weights.double(), shares / shares.sum(), rtol=1e-5)


@pytest.mark.parametrize("dtype", SUFFIXES)
def test_of_equal_logits_the_first_expert_is_chosen(dtype):
    _, launches, memory = made(dtype)
    memory.normed.copy_(torch.randn(192).to(dtype))
    router = torch.randn(1, 192).to(dtype).repeat(8, 1)
    choice, weights = run_route(memory, launches, router, router, 3)
    assert choice[:5] == [0, 1, 0, 1, 2]
    assert weights.tolist() == [0.5, 0.5]


def test_a_nan_makes_all_weights_nan_and_still_names_experts():
    _, launches, memory = made(torch.float32)
    memory.normed.copy_(torch.randn(192))
    router = torch.randn(8, 192)
    router[5, 7] = float("nan")
    choice, weights = run_route(memory, launches, router)
    assert weights.isnan().all()
    assert len(set(choice[:2])) == 2 and set(choice[:2]) <= set(range(8))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (9, 192), (33, 1348), (8, 30)])
def test_the_heads_logits_are_the_cpus(rows, columns, order):
    torch.manual_seed(10 * rows + order)
    device = RecordingDevice()
    device.thread_order = order
    weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(columns).bfloat16()
    y = torch.empty(rows, dtype=torch.bfloat16)
    device.launch("linear_bf16", (-(-rows // 8), 1, 1), 256, (weight, x, rows, columns, y))
    assert torch.equal(y, kernels.linear_bf16(x.float()[None], weight)[0].bfloat16())
