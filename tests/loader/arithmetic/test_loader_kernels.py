"""Native CPU kernels against an independent numpy reading of the tile layout (docs/format.md,
docs/numerics.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_matrices import PACKINGS, Expert, Matrix, activations, quantized
from linear_many import products_of

from formats import packing as reference
from formats import tiles
from loader.arithmetic import kernels
from loader.arithmetic.expert_table import ExpertTable

pytestmark = pytest.mark.skipif(not kernels.available(), reason="native kernels are not built")

ISAS = kernels.supported_isas() if kernels.available() else []
SHAPES = [(1, 1), (33, 65), (32, 256), (70, 192), (96, 600)]


@pytest.fixture(autouse=True)
def _automatic_isa_and_two_threads() -> Iterator[None]:
    kernels.set_threads(2)
    yield
    kernels.set_isa("auto")
    kernels.set_threads(0)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 50])
def test_kernel_agrees_with_float64_over_the_same_int8_activations(
    name: str, isa: str, shape: tuple[int, int], tokens: int
) -> None:
    kernels.set_isa(isa)
    w = Matrix(name, *shape, seed=shape[0])
    x = activations(tokens, shape[1], seed=tokens)
    y = kernels.linear(x, w.tensor(), name, w.rows)
    assert relative(y.numpy(), quantized(x.numpy()) @ w.values.T) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("tokens", [1, 5])
def test_largest_codes_scales_and_activations_do_not_overflow(
    name: str, isa: str, sign: float, tokens: int
) -> None:
    kernels.set_isa(isa)
    w = Matrix(name, 40, 512, seed=3, extreme=True)
    x = torch.full((tokens, 512), sign)
    y = kernels.linear(x, w.tensor(), name, w.rows)
    assert relative(y.numpy(), x.double().numpy() @ w.values.T) < 1e-6


@pytest.mark.parametrize("name", PACKINGS)
def test_all_instruction_sets_and_thread_counts_give_the_same_bits(name: str) -> None:
    w, expert = Matrix(name, 290, 520, seed=1), Expert(name, name, 192, 384, seed=5)
    x, hidden = activations(14, 520), activations(14, 192)
    index = torch.zeros((14, 1), dtype=torch.int64)
    table = ExpertTable(1, 192, 384, name, name)
    table.set(0, expert.blob)
    results = []
    for isa in ISAS:
        kernels.set_isa(isa)
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            results.append(
                (
                    kernels.linear(x, w.tensor(), name, w.rows),
                    table.run(hidden, index, torch.ones((14, 1))),
                )
            )
    assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", PACKINGS)
def test_a_batch_gives_the_bits_of_its_single_tokens(name: str, isa: str) -> None:
    kernels.set_isa(isa)
    w = Matrix(name, 64, 512, seed=2)
    tiles = w.tensor()
    for tokens in [*range(2, 15), 24, 49, 101]:
        x = activations(tokens, 512, seed=tokens)
        single = torch.cat([kernels.linear(x[t : t + 1], tiles, name, 64) for t in range(tokens)])
        assert torch.equal(kernels.linear(x, tiles, name, 64), single), tokens


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", PACKINGS)
def test_bits_do_not_depend_on_alignment(name: str, isa: str) -> None:
    kernels.set_isa(isa)
    w = Matrix(name, 33, 300, seed=2)
    for tokens in (1, 6):
        x = activations(tokens, 300)
        first = kernels.linear(x, w.tensor(), name, 33)
        shifted = torch.empty(x.numel() + 1)[1:].view(tokens, 300).copy_(x)
        for offset in (1, 3, 32, 63):
            assert torch.equal(kernels.linear(shifted, w.tensor(offset), name, 33), first)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("gate_up", "down"), [(n, n) for n in PACKINGS] + [("tile32-q2-g16-s4", "tile32-q4-g64-s8")]
)
@pytest.mark.parametrize(("hidden", "intermediate"), [(192, 384), (100, 72), (256, 512), (5, 3)])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_fused_experts_agree_with_the_composition(
    gate_up: str, down: str, isa: str, hidden: int, intermediate: int, tokens: int
) -> None:
    kernels.set_isa(isa)
    pair = [Expert(gate_up, down, hidden, intermediate, seed) for seed in (1, 7)]
    x = activations(tokens, hidden)
    weights = torch.rand((tokens, 2), generator=torch.Generator().manual_seed(1))
    rows = torch.arange(tokens, dtype=torch.int32)
    calls = [
        kernels.ExpertCall(e.blob, gate_up, down, rows, weights[:, i].contiguous())
        for i, e in enumerate(pair)
    ]
    fused = kernels.experts(x, calls, intermediate)
    expected = sum(e.run(x) * weights[:, i : i + 1] for i, e in enumerate(pair))
    # A last-bit difference in SwiGLU can move one int8 of h by one step.
    assert relative(fused.numpy(), np.asarray(expected)) < 2e-3


def test_a_call_over_a_list_equals_calls_over_its_parts() -> None:
    name = "tile32-q2-g16-s4"
    pair = [Expert(name, name, 192, 384, seed) for seed in (1, 7)]
    x = activations(6, 192)
    calls = [
        kernels.ExpertCall(
            e.blob, name, name, torch.tensor(rows, dtype=torch.int32), torch.rand(len(rows))
        )
        for e, rows in zip(pair, ([0, 2, 5], [1, 2, 3, 4]), strict=True)
    ]
    parts = kernels.experts(x, calls[:1], 384)
    assert torch.equal(
        kernels.experts(x, calls, 384), kernels.experts(x, calls[1:], 384, out=parts)
    )


def test_a_routers_answer_gives_the_bits_of_the_explicit_lists() -> None:
    name, tokens = "tile32-q3-g32-s4", 20
    many = [Expert(name, name, 192, 384, seed) for seed in range(0, 24, 3)]
    table = ExpertTable(8, 192, 384, name, name)
    for i, e in enumerate(many):
        table.set(i, e.blob)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(tokens)])
    weights, x = torch.rand((tokens, 2), generator=generator), activations(tokens, 192)
    calls = []
    for i, e in enumerate(many):
        rows, slots = torch.where(index == i)
        calls.append(
            kernels.ExpertCall(e.blob, name, name, rows.int(), weights[rows, slots].contiguous())
        )
    assert torch.equal(table.run(x, index, weights), kernels.experts(x, calls, 384))


def test_many_pairs_in_several_passes_give_the_bits_of_single_tokens() -> None:
    name, tokens = "tile32-q2-g16-s4", 700
    table = ExpertTable(2, 64, 64, name, name)
    for i in range(2):
        table.set(i, Expert(name, name, 64, 64, i).blob)
    x, weights = activations(tokens, 64), torch.rand((tokens, 2))
    index = torch.tensor([[0, 1]]).repeat(tokens, 1)
    whole = table.run(x, index, weights)
    single = [table.run(x[t : t + 1], index[:1], weights[t : t + 1]) for t in range(0, tokens, 50)]
    assert torch.equal(whole[::50], torch.cat(single))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_a_value_that_is_not_finite_spoils_its_token_and_no_other(
    isa: str, bad: float, tokens: int
) -> None:
    kernels.set_isa(isa)
    for name in PACKINGS:
        w, expert = Matrix(name, 40, 192, seed=1), Expert(name, name, 192, 100, seed=2)
        x = activations(tokens, 192)
        x[0, 70] = bad
        table = ExpertTable(1, 192, 100, name, name)
        table.set(0, expert.blob)
        index = torch.zeros((tokens, 1), dtype=torch.int64)
        for y in (
            kernels.linear(x, w.tensor(), name, 40),
            table.run(x, index, torch.ones((tokens, 1))),
        ):
            assert not y[0].isfinite().any()
            assert y[1:].isfinite().all()


def test_zero_and_tiny_activations_give_zero() -> None:
    w = Matrix("tile32-q4-g64-s8", 32, 256, seed=1)
    for value in (0.0, 1e-40, -1e-38):
        y = kernels.linear(torch.full((2, 256), value), w.tensor(), w.name, 32)
        assert (y == 0).all()


def test_several_matrices_over_one_activation_give_the_bits_of_single_calls() -> None:
    many = [
        Matrix(n, rows, 320, seed=rows)
        for n, rows in zip(PACKINGS, (64, 1, 33, 300, 96), strict=True)
    ]
    for tokens in (1, 4, 20):
        x = activations(tokens, 320)
        together = products_of(x, [kernels.PackedMatrix(w.tensor(), w.name, w.rows) for w in many])
        for w, y in zip(many, together, strict=True):
            assert torch.equal(y, kernels.linear(x, w.tensor(), w.name, w.rows))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("shape", [(1, 1), (50, 300), (33, 64)])
def test_bf16_linear_agrees_with_float64_with_the_same_bits_on_each_path(
    tokens: int, shape: tuple[int, int]
) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    x = activations(tokens, shape[1])
    results = []
    for isa in ISAS:
        kernels.set_isa(isa)
        results.append(kernels.linear_bf16(x, w))
    assert relative(results[0].double().numpy(), (x.double() @ w.double().T).numpy()) < 1e-6
    assert all(torch.equal(r, results[0]) for r in results)


def test_no_tokens_and_no_experts_are_fine() -> None:
    name = "tile32-q2-g16-s4"
    w, expert = Matrix(name, 40, 64, seed=1), Expert(name, name, 64, 64, seed=2)
    assert kernels.linear(torch.empty((0, 64)), w.tensor(), name, 40).shape == (0, 40)
    assert (kernels.experts(torch.ones((3, 64)), [], 64) == 0).all()
    none = kernels.ExpertCall(
        expert.blob, name, name, torch.empty(0, dtype=torch.int32), torch.empty(0)
    )
    assert (kernels.experts(torch.ones((3, 64)), [none], 64) == 0).all()


def test_two_python_threads_can_call_at_the_same_time() -> None:
    w = Matrix("tile32-q2-g16-s4", 500, 600, seed=1)
    tiles, inputs = w.tensor(), [activations(n, 600, seed=n) for n in (1, 9)]
    expected = [kernels.linear(x, tiles, w.name, w.rows) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(kernels.linear(inputs[i], tiles, w.name, w.rows), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_wrong_arguments_are_refused() -> None:
    name = "tile32-q2-g16-s4"
    w, expert = Matrix(name, 40, 64, seed=1), Expert(name, name, 64, 64, seed=2)
    x, tiles = activations(2, 64), w.tensor()
    rows, ones = torch.arange(2, dtype=torch.int32), torch.ones(2)
    table = ExpertTable(2, 64, 64, name, name)
    table.set(0, expert.blob)
    cases = [
        lambda: kernels.linear(x, tiles[:-1], name, 40),
        lambda: kernels.linear(x, tiles, name, 65),
        lambda: kernels.linear(x, tiles, name, -1),
        lambda: kernels.linear(x.double(), tiles, name, 40),
        lambda: kernels.linear(activations(64, 2).T, tiles, name, 40),
        lambda: kernels.linear(x[0], tiles, name, 40),
        lambda: kernels.linear(x, tiles.view(torch.int8), name, 40),
        lambda: kernels.linear(x, tiles, "tile32-q5", 40),
        lambda: kernels.linear_bf16(x, torch.zeros((3, 63), dtype=torch.bfloat16)),
        lambda: kernels.linear_bf16(x, torch.zeros((3, 64))),
        lambda: kernels.experts(
            x, [kernels.ExpertCall(expert.blob[1:], name, name, rows, ones)], 64
        ),
        lambda: kernels.experts(
            x, [kernels.ExpertCall(expert.blob, name, name, rows, ones[:1])], 64
        ),
        lambda: kernels.experts(
            x, [kernels.ExpertCall(expert.blob, name, name, rows + 1, ones)], 64
        ),
        lambda: kernels.experts(
            x, [kernels.ExpertCall(expert.blob, name, name, rows.long(), ones)], 64
        ),
        lambda: kernels.experts(x, [], 64, out=torch.zeros((2, 63))),
        lambda: table.set(0, expert.blob[1:]),
        lambda: table.set(2, expert.blob),
        lambda: table.run(x, torch.ones((2, 1), dtype=torch.int64), torch.ones((2, 1))),
        lambda: table.run(x, torch.full((2, 1), -1), torch.ones((2, 1))),
        lambda: table.run(x, torch.zeros((3, 1), dtype=torch.int64), torch.ones((3, 1))),
        lambda: table.run(x, torch.zeros((2, 1), dtype=torch.int64), torch.ones((2, 2))),
        lambda: kernels.set_isa("sse9"),
    ]
    for number, case in enumerate(cases):
        with pytest.raises(ValueError, match=r"."):
            case()
            pytest.fail(f"case {number} was accepted")


@pytest.mark.parametrize("name", PACKINGS)
def test_the_reference_packing_writes_and_means_the_same_bytes(name: str) -> None:
    w = Matrix(name, 40, 300, seed=4)
    packing, groups = reference.tile_packing_named(name), -(-300 // PACKINGS[name][1])
    matrix = tiles.QuantizedMatrix(
        torch.from_numpy(w.codes[:40, :300].astype(np.uint8)),
        torch.from_numpy(w.s[:40, :groups].astype(np.int16)),
        torch.from_numpy(w.m[:40, :groups].astype(np.int16)),
        torch.from_numpy(w.ds[:40]),
        torch.from_numpy(w.dm[:40]),
    )
    assert torch.equal(tiles.pack(matrix, packing).reshape(-1), torch.from_numpy(w.bytes))
    assert relative(tiles.dequantize(matrix, packing.group_size).double().numpy(), w.values) < 1e-6


def test_parts_of_a_routers_answer_add_up_to_the_whole() -> None:
    name = "tile32-q4-g64-s8"
    blobs = [Expert(name, name, 64, 96, seed).blob for seed in (1, 7)]
    x, index = activations(5, 64), torch.tensor([[0, 1]]).repeat(5, 1)
    weights = torch.rand((5, 2))
    whole = ExpertTable(2, 64, 96, name, name)
    parts = [ExpertTable(2, 64, 96, name, name) for _ in range(2)]
    for i in range(2):
        whole.set(i, blobs[i])
        parts[i].set(i, blobs[i])
    out = parts[0].run(x, index, weights, partial=True)
    assert torch.equal(
        parts[1].run(x, index, weights, out=out, partial=True), whole.run(x, index, weights)
    )


def test_describe_names_the_path() -> None:
    kernels.set_isa("portable")
    assert "portable" in kernels.describe()
    assert kernels.isa() == "portable"


def test_stream_sum_reads_every_word() -> None:
    words = torch.arange(10_000, dtype=torch.int64)
    assert kernels.stream_sum([words.view(torch.uint8)] * 2, chunk_bytes=1024) == 2 * int(
        words.sum()
    )
