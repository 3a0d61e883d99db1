"""A KeyboardInterrupt at any line of the cache: the same model gives the same tokens afterwards,
and leaks nothing.
"""

import contextlib
import linecache
import opcode
import sys
import threading
from pathlib import Path

import pytest
import torch
from inside import inside
from pattern_reader import GpuCache
from slow_reader import SlowReader
from transformers import DynamicCache

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from loader.experts.cache import ExpertCache

IDS = torch.tensor([[1, 17, 300, 42, 99]])
FILES = {
    *(
        "experts/" + name
        for name in (
            "buffers.py",
            "cache.py",
            "cache_entry.py",
            "cache_state.py",
            "fetcher.py",
            "lease.py",
            "monitor.py",
            "pins.py",
            "policy.py",
            "slot_table.py",
            "slots.py",
            "streaming.py",
        )
    ),
    "decode/cpu.py",
    "hf/cache_length.py",
    "hf/decoder_path.py",
    "hf/growing_cache.py",
    "hf/served_model.py",
}
"""Files whose lines are interrupted, by their last folder and name."""
assert all((Path(loader.__file__).parent / name).is_file() for name in FILES)
GPU_FILES = {
    f"experts/{name}.py"
    for name in (
        "gpu_reader",
        "page_locked",
        "pinned_tier",
        "tier_contents",
        "tier_pool",
        "tier_use",
    )
}
assert all((Path(loader.__file__).parent / "cuda" / name).is_file() for name in GPU_FILES)
PLACES = 40
"""How many of the lines that a call runs it is interrupted at, evenly spread."""


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "mini"
    convert_checkpoint(source, folder, make_recipe("2bit", solver="hqq"))
    return folder


class Lines:
    """Counts this thread's lines in `files` while it is a context; raises KeyboardInterrupt at
    number `at`.

    first, last: the numbers at which each place comes.
    """

    def __init__(self, at=None, files=FILES):
        self.files = files
        self.at, self.count, self.place = at, 0, None
        self.first, self.last = {}, {}

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *raised):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        return (
            self._line
            if "/".join(frame.f_code.co_filename.rsplit("/", 2)[1:]) in self.files
            else None
        )

    def _line(self, frame, event, argument):
        if event == "line" and not _leaves_a_with_block(frame):
            self.count += 1
            place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            self.first.setdefault(place, self.count)
            self.last[place] = self.count
            if self.count == self.at:
                self.place = place
                raise KeyboardInterrupt
        return self._line


def _leaves_a_with_block(frame):
    """A trace function can raise between a block and the __exit__ of its lock; Python takes no
    signal there.
    """
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]] in (
        "LOAD_CONST",
        "PUSH_EXC_INFO",
        "SWAP",
    ) and linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def generated(model, tokens=2):
    with torch.no_grad():
        return model.generate(
            IDS, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=2
        )


def check_counts(cache):
    """Nothing is pinned, every buffer is free or holds an expert."""
    inside(cache, "monitor").wait_for(
        lambda: (
            not any(h.job for slots in inside(cache, "layers") for h in slots.entries()) or None
        ),
        60,
    )
    side = inside(cache, "layers")[0].staging
    entries = [held for slots in inside(cache, "layers") for held in slots.entries()]
    assert not any(held.pins for held in entries)
    assert side.used == sum(len(slots.staged) for slots in inside(cache, "layers")) <= side.room
    assert all(len(slots.cached) <= slots.slots for slots in inside(cache, "layers"))
    taken = {held.buffer.data_ptr() for held in entries}
    assert len(taken) == len(entries)
    free = {buffer.data_ptr() for piece in side.pool.pieces for buffer in piece.free}
    assert not free & taken
    assert len(free) + len(taken) == sum(piece.count for piece in side.pool.pieces)


def within_a_minute(call):
    """The result of `call`, made by a thread, which fails the test instead of hanging it."""
    result = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(60)
    assert result, "it hangs or raised"
    return result[0]


def asked_for(cache):
    """Return the first byte of each expert that two tokens, a guess and two prompts request."""
    found = []
    with cache.lease(0, [0, 1]) as lease:
        cache.guess(1, [2, 3])
        found += [int(blob[0]) for blob in lease.all().values()]
    with cache.lease(1, [3, 0]) as lease:
        found += [int(blob[0]) for blob in lease.all().values()]
    for layer, ascending in enumerate([False, True]):
        parts = {}
        for blobs in cache.stream(layer, [1, 3, 0, 2], [1], ascending=ascending):
            parts |= {expert: int(blob[0]) for expert, blob in blobs.items()}
        found += [parts[expert] for expert in sorted(parts)]
    return found


@pytest.mark.parametrize("slots", [1, 2])
def test_an_interrupt_at_every_line_of_the_cache_leaves_it_whole(slots):
    cache = ExpertCache(SlowReader(layers=3, experts=4), slots)
    wanted = asked_for(cache)
    assert wanted == [0, 1, 3, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    with Lines() as lines:
        asked_for(cache)
    # Each line's first and last time; the lines between depend on the order in which reads end.
    for number in sorted({*lines.first.values(), *lines.last.values()}):
        with Lines(number) as interrupted:
            try:
                asked_for(cache)
            except KeyboardInterrupt:
                sys.settrace(None)
                assert asked_for(cache) == wanted, interrupted.place
        check_counts(cache)
    assert len(lines.first) > 200


def asked_for_on_a_gpu(gpu):
    gpu.token(0, [0, 1], [2, 3])
    gpu.token(1, [3, 0])
    gpu.prompt(0, [1, 3, 0, 2])
    gpu.prompt(1, [1, 3, 0, 2], ascending=True)


def test_an_interrupt_at_every_line_leaves_the_cache_of_a_gpu_whole():
    gpu = GpuCache(2, experts=4, layers=3, ram=6)
    asked_for_on_a_gpu(gpu)
    with Lines(files=FILES | GPU_FILES) as lines:
        asked_for_on_a_gpu(gpu)
    for number in sorted(lines.first.values()):
        with contextlib.suppress(KeyboardInterrupt), Lines(number, lines.files):
            asked_for_on_a_gpu(gpu)
        asked_for_on_a_gpu(gpu)
        gpu.check_counts()
    assert len(lines.first) > 200


CASES = [
    ("native", 0, 2), ("native", 1, 2), ("torch", 1, 2), ("native", 2, 1), ("native", 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("kernels", "prefetch", "slots"), CASES)
def test_the_same_tokens_come_after_an_interrupt_at_any_line(folder, kernels, prefetch, slots):
    model = loader.from_pretrained(
        folder, slots=[slots] * 3, io="direct", kernels=kernels, prefetch=prefetch
    )
    cache = model.model.layers[0].mlp.experts.cache
    wanted = generated(model)
    with Lines() as lines:
        generated(model)
    assert lines.count > 10 * PLACES
    for number in range(PLACES):
        with Lines(1 + lines.count * number // PLACES) as interrupted:
            try:
                generated(model)
            except KeyboardInterrupt:
                sys.settrace(None)
                # Here, where the traceback still holds what was in use.
                if number % 4 == 0:
                    assert torch.equal(within_a_minute(lambda: generated(model)), wanted), (
                        interrupted.place
                    )
                assert torch.equal(generated(model), wanted), interrupted.place
        check_counts(cache)


@pytest.mark.parametrize(("slots", "kv_bits"), [(2, 16), (4, 16), (4, 8)])
def test_an_interrupted_pass_leaves_the_kv_cache_as_long_as_it_was(folder, slots, kv_bits):
    model = loader.from_pretrained(folder, slots=[slots] * 3, io="direct", kv_bits=kv_bits)
    past, following = DynamicCache(), torch.tensor([[7]])

    def next_logits(lines):
        with lines:
            logits = model(input_ids=following, past_key_values=past).logits
        past.crop(-1)
        return logits

    with torch.no_grad():
        model(input_ids=IDS, past_key_values=past)
        lines = Lines()
        wanted = next_logits(lines)
        for number in range(PLACES):
            interrupted = Lines(1 + lines.count * number // PLACES)
            with contextlib.suppress(KeyboardInterrupt):
                next_logits(interrupted)
            assert {layer.get_seq_length() for layer in past.layers} == {5}, interrupted.place
            assert torch.equal(next_logits(Lines()), wanted), interrupted.place
