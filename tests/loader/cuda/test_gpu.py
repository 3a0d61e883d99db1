"""The facts that other tests show on the CPU also hold on a real GPU."""

import pytest
import torch

import loader
from formats.artifact import Artifact
from formats.expert import ExpertLayout
from formats.packing import PACKINGS
from loader.arithmetic import kernels
from loader.arithmetic.native_backend import NativeBackend
from loader.cuda.products.packed_products import Products
from loader.cuda.products.self_check import random_expert

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

IDS = torch.tensor([[1, 17, 300, 42, 99, 7, 1234, 56, 800, 3]])


@pytest.fixture(scope="module")
def device():
    from loader.cuda.device.torch_device import CudaDevice

    return CudaDevice(0)


@pytest.mark.skipif(not kernels.available(), reason="compares with the native CPU kernels")
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 33, 200])
@pytest.mark.parametrize("name", PACKINGS)
def test_experts_have_the_cpus_bits(device, name, tokens):
    generator = torch.Generator().manual_seed(tokens)
    layout = ExpertLayout(1024, 1792, PACKINGS[name], PACKINGS[name])
    blobs = {expert: random_expert(layout, generator) for expert in range(3)}
    layouts = dict.fromkeys(range(3), layout)
    x = torch.randn(tokens, 1024, generator=generator)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    expected = torch.zeros_like(x)
    NativeBackend().experts(
        {e: blobs[e] for e in index.unique().tolist()}, layouts, x, index, weights, expected
    )
    there = {e: blobs[e].to(device.torch_device) for e in index.unique().tolist()}
    out = torch.zeros_like(x, device=device.torch_device)
    x_there, weights_there = x.to(device.torch_device), weights.to(device.torch_device)
    Products(device).add_experts(there, layouts, x_there, index, weights_there, out)
    assert torch.equal(out.cpu(), expected)


@torch.no_grad()
def generated(model):
    ids = IDS.to(model.device)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        pad_token_id=2,
    ).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"prefetch": 0}, {"cpu_share": "auto"}, {"ram_cache": "2MB"}], ids=str
)
@pytest.mark.parametrize("slots", [8, 4, 0])
def test_tokens_are_the_cpus(converted, slots, options):
    folder = converted("2bit")
    layers = Artifact.open(folder).architecture.num_hidden_layers
    model = loader.from_pretrained(
        folder, device="cuda", dtype=torch.float32, slots=[slots] * layers, **options
    )
    assert generated(model) == generated(
        loader.from_pretrained(folder, device="cpu", dtype=torch.float32)
    )


def test_auto_takes_the_gpu(converted):
    assert loader.from_pretrained(converted("2bit")).device.type == "cuda"
