"""A model with less memory than its experts need: the same bits in every setting; typed errors."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import torch
from project_paths import ROOT

import loader
from formats.artifact import Artifact
from formats.errors import DamageError
from formats.reading.direct_reader import DirectReader
from formats.reading.mmap_reader import MmapReader
from loader.arithmetic import kernels
from loader.budget.expert_sizes import expert_bytes_by_layer, staging_bytes

IDS = torch.tensor([[1, 17, 300, 42, 99, 7, 1234, 56, 800, 3]])


def budget(folder, slots):
    artifact = Artifact.open(folder)
    return int(slots * sum(expert_bytes_by_layer(artifact))) + staging_bytes(artifact, 2)


@torch.no_grad()
def outputs(model, batch=1):
    """Logits of a prompt and of the tokens that follow it, greedy."""
    ids = IDS.expand(batch, -1)
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(result.logits), result.sequences


@pytest.fixture(scope="module")
def all_in_ram(converted):
    return outputs(loader.from_pretrained(converted("2bit")))


COMBINATIONS = list(
    itertools.product((0, 1.5, 4.3), ("mmap", "direct"), (0, 1, 3), ("lru", "lfu", "lrfu"))
)


@pytest.mark.parametrize(("slots", "io", "prefetch", "policy"), COMBINATIONS)
def test_no_choice_changes_a_bit(converted, all_in_ram, slots, io, prefetch, policy):
    folder = converted("2bit")
    model = loader.from_pretrained(
        folder, ram_cache=budget(folder, slots), io=io, prefetch=prefetch, policy=policy
    )
    logits, tokens = outputs(model)
    assert torch.equal(tokens, all_in_ram[1])
    assert torch.equal(logits, all_in_ram[0])
    total = model.moe_stats().total
    assert (total.guesses > 0) == (prefetch > 0)
    assert total.misses > 0


def test_experts_that_arrive_in_any_order_give_the_same_bits(converted, all_in_ram, monkeypatch):
    folder = converted("2bit")
    fetch, generator = DirectReader.fetch, random.Random(0)

    def slow(self, *arguments):
        for _ in range(generator.randrange(200)):
            os.sched_yield()
        fetch(self, *arguments)

    monkeypatch.setattr(DirectReader, "fetch", slow)
    model = loader.from_pretrained(folder, ram_cache=budget(folder, 1.5))
    for _ in range(2):
        logits, tokens = outputs(model)
        assert torch.equal(tokens, all_in_ram[1])
        assert torch.equal(logits, all_in_ram[0])


def test_a_batch_reads_the_union_of_its_experts_once(converted):
    folder = converted("2bit")
    small = loader.from_pretrained(folder, ram_cache=budget(folder, 3))
    free = loader.from_pretrained(folder)
    assert torch.equal(outputs(small, batch=4)[1], outputs(free, batch=4)[1])
    small.reset_moe_stats()
    with torch.no_grad():
        small(IDS.view(-1, 1), use_cache=False)
    assert all(layer.hits + layer.misses <= 8 for layer in small.moe_stats().layers)


def test_what_changed_after_the_folder_was_opened_is_found_when_it_is_read(converted_copy):
    model = loader.from_pretrained(converted_copy, ram_cache=budget(converted_copy, 2))
    artifact = Artifact.open(converted_copy)
    with open(artifact.layer_path(3), "r+b") as f:
        for entry in artifact.index.layers[3].experts:
            f.seek(entry.offset + 1000)
            byte = f.read(1)
            f.seek(entry.offset + 1000)
            f.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DamageError, match=r"layer 3 expert \d .*xxh3"):
        outputs(model)


def test_an_error_of_the_disk_names_the_expert_and_the_model_goes_on_afterwards(
    converted, all_in_ram, monkeypatch
):
    folder = converted("2bit")
    monkeypatch.setattr("formats.reading.reader._PAUSES_S", (0.0,))
    model = loader.from_pretrained(folder, ram_cache=budget(folder, 2))
    fetch = DirectReader.fetch

    def broken(self, layer, *arguments):
        if layer == 5:
            raise OSError(5, "Input/output error")
        fetch(self, layer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DirectReader, "fetch", broken)
        with pytest.raises(DamageError, match=r"layer 5 expert \d .*Input/output error"):
            outputs(model)
    assert torch.equal(outputs(model)[0], all_in_ram[0])


def test_a_file_that_was_replaced_is_read_as_it_was(converted_copy, all_in_ram):
    model = loader.from_pretrained(converted_copy, ram_cache=budget(converted_copy, 2))
    path = Artifact.open(converted_copy).layer_path(2)
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)
    assert torch.equal(outputs(model)[0], all_in_ram[0])


def test_mapped_memory_is_given_back_when_an_expert_leaves(converted, monkeypatch):
    folder = converted("2bit")
    forgotten = []
    monkeypatch.setattr(
        MmapReader, "forget", lambda self, layer, expert: forgotten.append((layer, expert))
    )
    model = loader.from_pretrained(folder, ram_cache=budget(folder, 2), io="mmap")
    outputs(model)
    assert len(forgotten) >= model.moe_stats().total.evictions > 0


def test_a_second_model_of_the_folder_works_beside_the_first(converted, all_in_ram):
    folder = converted("2bit")
    models = [loader.from_pretrained(folder, ram_cache=budget(folder, slots)) for slots in (1, 3)]
    results = [None, None]

    def work(number):
        results[number] = outputs(models[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found, all_in_ram[0]) for found in results)


INTERRUPTED = """
import os, sys, threading, torch, loader
from formats.reading.direct_reader import DirectReader
reading, fetch = threading.Event(), DirectReader.fetch
def stuck(self, layer, *arguments):
    if layer == 4 and not reading.is_set():
        os.write(1, b"reading\\n")  # whole, though two threads say it
        reading.wait(30)
    fetch(self, layer, *arguments)
DirectReader.fetch = stuck
model = loader.from_pretrained(sys.argv[1], ram_cache=int(sys.argv[2]))
ids = torch.tensor([[1, 17, 300]])
try:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=2)
except KeyboardInterrupt:
    reading.set()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=2)
    print("went on", flush=True)
    raise
"""


@pytest.mark.usefixtures("sigint")
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_during_a_read_ends_the_process_and_hangs_nothing(converted):
    folder = converted("2bit")
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, folder, str(budget(folder, 1))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},
    )  # fmt: skip
    assert child.stdout.readline() == "reading\n"
    child.send_signal(signal.SIGINT)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert out.splitlines()[-1:] == ["went on"], (child.returncode, out, err)
    assert "KeyboardInterrupt" in err
    assert child.returncode != 0


@pytest.mark.skipif(not kernels.available(), reason="not built")
def test_native_and_torch_wait_for_the_same_experts(converted):
    folder = converted("2bit")
    counts = []
    for name in ("native", "torch"):
        model = loader.from_pretrained(
            folder, ram_cache=budget(folder, 3), kernels=name, dtype=torch.float32
        )
        outputs(model)
        counts.append([layer.hits + layer.misses for layer in model.moe_stats().layers])
    assert counts[0] == counts[1]
