"""Whole models on a recording device give the CPU's tokens and stay within its memory."""

import logging

import pytest
import torch
from cuda_host import COMPILER
from recording_device import RecordingDevice

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.errors import DoesNotFitError, MoeConvertError
from loader.budget.expert_sizes import expert_bytes_by_layer
from loader.cuda import device_choice
from loader.cuda.experts import gpu_budget
from loader.cuda.experts.cpu_share import Speeds
from loader.cuda.products.packed_products import Products

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

IDS = torch.tensor([[1, 17, 300, 42, 99, 7, 1234, 56, 800, 3]])
NEW_TOKENS = 6


@torch.no_grad()
def generated(model, batch=1, length=10):
    ids = IDS[:, :length].expand(batch, -1)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=2,
    ).tolist()


@pytest.fixture(scope="module")
def folder(converted):
    return converted("2bit")


@pytest.fixture(scope="module")
def on_cpu(folder):
    return generated(loader.from_pretrained(folder, device="cpu"))


def layers_of(folder):
    return Artifact.open(folder).architecture.num_hidden_layers


def one_expert(folder):
    return max(expert_bytes_by_layer(Artifact.open(folder)))


@pytest.mark.parametrize(
    ("slots", "prefetch", "order"),
    [(8, "auto", "late"), (2, "auto", 0), (2, 0, "early"), (0, "auto", 1)],
)
def test_tokens_are_the_cpus_and_everything_is_ordered(folder, on_cpu, slots, prefetch, order):
    device = RecordingDevice(order=order)
    model = loader.from_pretrained(
        folder, device=device, slots=[slots] * layers_of(folder), prefetch=prefetch
    )
    assert generated(model) == on_cpu
    assert not device.races
    total = model.moe_stats().total
    assert total.misses > 0 and (total.guesses > 0) == (prefetch == "auto")


def test_the_host_waits_once_a_layer_for_a_token(folder):
    device = RecordingDevice()
    model = loader.from_pretrained(folder, device=device, slots=[2] * layers_of(folder))
    generated(model, length=1)
    device.synchronisations.clear()
    generated(model, length=1)
    # A prompt of one token is one token more.
    assert len(device.syncs_of()) == NEW_TOKENS * layers_of(folder)


def test_layers_are_split_between_gpus(folder, on_cpu):
    first = RecordingDevice()
    second = RecordingDevice(name="cuda:1", beside=first)
    model = loader.from_pretrained(folder, device=[first, second], slots=[3] * layers_of(folder))
    assert generated(model) == on_cpu
    assert first.copied_bytes["to device"] > 0 and second.copied_bytes["to device"] > 0
    assert not first.races


def test_a_batch_goes_through_the_slots_too(folder):
    device = RecordingDevice(order=2)
    model = loader.from_pretrained(folder, device=device, slots=[2] * layers_of(folder))
    assert generated(model, batch=2) == generated(
        loader.from_pretrained(folder, device="cpu"), batch=2
    )
    assert not device.races


def test_less_ram_than_experts_reads_some_again(folder, on_cpu):
    device = RecordingDevice()
    ram = 6 * one_expert(folder)
    model = loader.from_pretrained(
        folder, device=device, slots=[1] * layers_of(folder), ram_cache=ram
    )
    assert generated(model) == on_cpu
    tier = model.moe_stats().ram
    # Buffers are whole pages.
    assert tier.evictions > 0 and tier.buffer_bytes <= ram + 6 * 4096
    assert not device.races


def test_what_the_cpu_computes_changes_no_token(folder, on_cpu, monkeypatch):
    monkeypatch.setattr(Speeds, "measured", classmethod(lambda cls, device, n_bytes: cls(1.0, 1.5)))
    device = RecordingDevice()
    model = loader.from_pretrained(
        folder, device=device, slots=[2] * layers_of(folder), cpu_share="auto"
    )
    assert generated(model) == on_cpu
    assert model.moe_stats().total.cpu_experts > 0
    assert not device.races


def test_out_of_memory_during_generation_gives_up_slots_and_goes_on(
    folder, on_cpu, monkeypatch, caplog
):
    device = RecordingDevice()
    monkeypatch.setattr(gpu_budget, "ALLOCATION_BYTES", 4 * one_expert(folder))
    model = loader.from_pretrained(folder, device=device, slots=[6] * layers_of(folder))
    before, add, calls = sum(model.moe_stats().slots), Products.add_experts, []

    def out_of_memory_once(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        add(*args)

    monkeypatch.setattr(Products, "add_experts", out_of_memory_once)
    with caplog.at_level(logging.WARNING):
        assert generated(model) == on_cpu
    assert sum(model.moe_stats().slots) < before
    assert "MiB of expert slots" in caplog.text
    assert not device.races


def test_out_of_memory_without_a_slot_left_is_an_error_that_says_so(folder, monkeypatch):
    model = loader.from_pretrained(folder, device=RecordingDevice(), slots=[0] * layers_of(folder))

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(Products, "add_experts", out_of_memory)
    with pytest.raises(DoesNotFitError, match="no expert slot is left to free: CUDA out of memory"):
        generated(model)


def test_what_does_not_fit_is_refused_with_the_numbers(folder):
    device = RecordingDevice(capacity_bytes=1 << 20)
    with pytest.raises(
        DoesNotFitError, match="cuda:0: 1048576 of 1048576 bytes are free; the trunk"
    ):
        loader.from_pretrained(folder, device=device)


def test_a_map_is_refused(folder):
    with pytest.raises(MoeConvertError, match="not page-locked"):
        loader.from_pretrained(folder, device=RecordingDevice(), io="mmap")


def test_bfloat16_becomes_float16_where_the_gpu_has_none(folder):
    old, new = RecordingDevice(), RecordingDevice()
    new.capability = (8, 6)
    assert loader.from_pretrained(folder, device=old).dtype is torch.float16
    assert loader.from_pretrained(folder, device=new).dtype is torch.bfloat16
    assert loader.from_pretrained(folder, device=old, dtype=torch.bfloat16).dtype is torch.bfloat16


@pytest.fixture
def broken_gpu(monkeypatch):
    """Make torch find one GPU, whose products are never computed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "loader.cuda.device.torch_device.cuda_devices", lambda names, kept: [RecordingDevice()]
    )
    monkeypatch.setattr(Products, "add_experts", lambda *args: None)


def test_a_gpu_that_computes_something_else_is_refused(folder, broken_gpu):
    with pytest.raises(
        MoeConvertError, match=r"cuda:0: an expert of 1 tokens in tile32-q2-g16-s4 is off by 1 "
    ):
        loader.from_pretrained(folder, device="cuda")


def test_auto_leaves_a_gpu_alone_that_computes_something_else(folder, on_cpu, broken_gpu, caplog):
    with caplog.at_level(logging.WARNING):
        model = loader.from_pretrained(folder)
    assert "the GPU is not used: cuda:0: an expert of 1 tokens" in caplog.text
    assert generated(model) == on_cpu


def test_auto_leaves_a_gpu_alone_that_is_too_small(folder, on_cpu, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = RecordingDevice(capacity_bytes=4 << 20)
    monkeypatch.setattr("loader.cuda.device.torch_device.cuda_devices", lambda names, kept: [small])
    with caplog.at_level(logging.WARNING):
        model = loader.from_pretrained(folder)
    assert "the GPU is not used: cuda:0: " in caplog.text and "bytes are free" in caplog.text
    assert generated(model) == on_cpu
    with pytest.raises(DoesNotFitError):
        loader.from_pretrained(folder, device="cuda")


def test_a_gpu_is_named_once():
    with pytest.raises(MoeConvertError, match="does not name each GPU once"):
        device_choice.choose_devices([RecordingDevice(), RecordingDevice()], [])


def test_experts_in_16_bits_go_through_the_same_slots(example_folder, tmp_path):
    folder = tmp_path / "16bit"
    convert_checkpoint(example_folder, folder, make_recipe("16bit"))
    device = RecordingDevice()
    device.capability = (8, 0)
    model = loader.from_pretrained(folder, device=device, slots=[2] * layers_of(folder))
    reference = loader.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        ours, theirs = model(IDS).logits, reference(IDS).logits
    assert (ours - theirs).norm() / theirs.norm() < 0.02
    generated(model)
    assert model.moe_stats().total.evictions > 0
    assert not device.races
