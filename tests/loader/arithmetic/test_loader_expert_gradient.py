"""The backward of one product and one expert against autograd over the dequantized weights."""

from typing import Any

import pytest
import torch
from random_weights import blob_of, random_tiles
from torch.nn import functional

from formats.expert import ExpertLayout
from formats.packing import PACKINGS, packing_named
from formats.tiles import expert_weights, matrix_weights
from loader.arithmetic import kernels
from loader.arithmetic.backend import choose_backend
from loader.arithmetic.torch_product import input_gradient, product
from loader.hf.modules.packed_modules import CachedExperts, PackedLinear

native = pytest.mark.skipif(not kernels.available(), reason="not built")
BACKENDS = ["torch", pytest.param("native", marks=native)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "packings",
    [
        ("tile32-q2-g16-s4", "tile32-q3-g64-s8"),
        ("rows-bf16", "rows-f16"),
        ("tile32-q4-g64-s8", "rows-bf16"),
    ],
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_an_experts_gradients_are_those_of_autograd(
    packings: tuple[str, str], top_k: int, backend: str
) -> None:
    layout = ExpertLayout(192, 160, *map(packing_named, packings))
    blobs = {expert: some_blob(layout, expert) for expert in range(4)}
    module = CachedExperts(
        0, dict.fromkeys(blobs, layout), OneLayer(blobs), choose_backend(backend)
    )
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(11, 192, generator=rng).requires_grad_(True)
    index = torch.stack([torch.randperm(4, generator=rng)[:top_k] for _ in range(11)])
    weights = torch.rand(11, top_k, generator=rng).requires_grad_(True)
    grad = torch.randn(11, 192, generator=rng)
    found = torch.autograd.grad(module(x, index, weights), (x, weights), grad)
    total = torch.zeros(11, 192)
    for expert, blob in blobs.items():
        gate, up, down = expert_weights(layout, blob)
        result = functional.linear(functional.silu(x @ gate.T) * (x @ up.T), down)
        total = total + result * (weights * (index == expert)).sum(1, keepdim=True)
    for ours, exact in zip(found, torch.autograd.grad(total, (x, weights), grad), strict=True):
        assert ((ours - exact).norm() / exact.norm()).item() < 1e-4


class OneLayer:
    """An expert source with all blobs in memory."""

    def __init__(self, blobs: dict[int, torch.Tensor]) -> None:
        self._blobs = blobs

    def router_ahead(self, layer: int) -> None:
        return None

    def stream(self, layer: int, experts: list[int], guesses: list[int], *, ascending: bool) -> Any:
        order = sorted(experts) if ascending else experts
        return ({expert: self._blobs[expert]} for expert in order)


def some_blob(layout: ExpertLayout, seed: int) -> torch.Tensor:
    if not any(name in PACKINGS for name in (layout.gate_up.name, layout.down.name)):
        return blob_of(layout, seed)
    torch.manual_seed(seed)
    blob = torch.randint(0, 256, (layout.n_bytes,), dtype=torch.uint8)
    begin = 0
    for packing, shape in (
        (layout.gate_up, layout.gate_up_shape),
        (layout.down, layout.down_shape),
    ):
        part = blob[begin : begin + shape[0] * shape[1] * packing.torch_dtype.itemsize]
        begin += part.numel()
        if packing.name in PACKINGS:
            # Row scales such that weights are about 0.1.
            part.view(shape)[:, :128] = torch.full((64,), 1e-3, dtype=torch.float16).view(
                torch.uint8
            )
        else:
            part.copy_(
                (torch.randn(shape) / 10).to(packing.torch_dtype).view(torch.uint8).flatten()
            )
    return blob


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("rows", [96, 70])
def test_the_gradient_of_a_product_is_grad_times_the_matrix(packing: Any, rows: int) -> None:
    torch.manual_seed(0)
    stored = torch.randint(0, 256, packing.stored_shape(rows, 300), dtype=torch.uint8)
    stored[:, :128] = torch.full((64,), 1e-3, dtype=torch.float16).view(torch.uint8)
    weights, grad = matrix_weights(packing, stored, rows, 300), torch.randn(5, rows)
    torch.testing.assert_close(
        input_gradient(stored, packing, rows, 300, grad), grad @ weights, rtol=1e-4, atol=1e-4
    )


def test_a_large_matrix_is_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = packing_named("tile32-q4-g64-s8")
    stored, grad = random_tiles(256, 64), torch.randn(3, 256)
    expected = input_gradient(stored, packing, 256, 64, grad)
    monkeypatch.setattr("loader.arithmetic.torch_product.CHUNK_WEIGHTS", 64 * 64)
    calls = []
    monkeypatch.setattr(
        "loader.arithmetic.torch_product.matrix_weights",
        lambda *a: calls.append(a[2]) or matrix_weights(*a),
    )
    torch.testing.assert_close(input_gradient(stored, packing, 256, 64, grad), expected)
    assert calls == [64] * 4


def test_autocast_does_not_round_the_reference_products() -> None:
    packing, x = packing_named("tile32-q4-g64-s8"), torch.randn(3, 64)
    stored = random_tiles(64, 64)
    expected = product(stored, packing, 64, 64, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(stored, packing, 64, 64, x), expected)


@native
def test_a_pass_with_gradients_does_not_round_activations_to_int8() -> None:
    packing, backend = packing_named("tile32-q4-g64-s8"), choose_backend("native")
    linear = PackedLinear(packing, 64, 200, backend)
    linear.packed = random_tiles(64, 200)
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    exact = product(linear.packed, packing, 64, 200, x)

    def off(found: torch.Tensor) -> float:
        return ((found - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        assert off(linear(x)) > 1e-3
    assert off(linear(x.requires_grad_(True))) < 1e-4
