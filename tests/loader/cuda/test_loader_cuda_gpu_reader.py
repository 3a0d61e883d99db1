"""Experts in a GPU's slots have the right bytes at each use, in every order of copies.

There is no race, and the host does not wait.
"""

import contextlib
import random
import threading
from itertools import chain

import pytest
from inside import inside
from pattern_reader import EXPERT_BYTES, GpuCache

from formats.errors import DamageError
from loader.experts import fetcher
from loader.experts.policy import POLICIES

ORDERS = ["late", "early", 0, 1]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make prefetches take four pieces."""
    monkeypatch.setattr(fetcher, "STEP_BYTES", EXPERT_BYTES // 4)


def in_ram(gpu, *keys):
    """Read experts into the tier."""
    for layer, expert in keys or inside(gpu.reader, "patterns"):
        with gpu.tier.use(layer, expert) as use:
            while not use.has_bytes:
                use.step()
    gpu.device.log.clear()


def settle(gpu, layer, *experts):
    """Wait until prefetches have arrived."""
    staged = inside(gpu.cache, "layers")[layer].staged
    inside(gpu.cache, "monitor").wait_for(
        lambda: all(e in staged and not staged[e].job for e in experts) or None, timeout_s=60
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_miss_is_one_copy_for_which_the_host_does_not_wait(order):
    gpu = GpuCache(2, order=order)
    in_ram(gpu)
    for layer in range(4):
        gpu.token(layer, [0, 1])
        gpu.token(layer, [1, 2])
    assert [what for kind, what in gpu.device.log if kind == "copy"] == [EXPERT_BYTES] * 12
    assert not gpu.device.syncs_of()
    total = gpu.cache.stats().total
    assert (total.hits, total.misses, total.bytes_read) == (4, 12, 12 * EXPERT_BYTES)
    assert gpu.device.copied_bytes == {"to device": 12 * EXPERT_BYTES, "to host": 0}
    gpu.check_counts()


def test_what_lies_pinned_is_queued_by_the_caller_itself():
    gpu = GpuCache(2)
    in_ram(gpu)
    gpu.token(0, [0, 1])
    assert not inside(inside(gpu.cache, "state").fetcher, "threads")


def test_what_is_there_is_computed_before_the_copy_of_the_rest_is_waited_for():
    gpu = GpuCache(3)
    in_ram(gpu)
    gpu.token(0, [0, 1])
    gpu.device.log.clear()
    gpu.token(0, [2, 3, 0])
    kinds = [kind for kind, _ in gpu.device.log if kind != "wait" or "compute" in _]
    assert kinds == ["copy", "copy", "launch", "wait", "launch", "wait", "launch"]


def test_the_next_experts_of_a_prompt_are_copied_while_one_is_computed():
    gpu = GpuCache(0)
    in_ram(gpu)
    assert gpu.prompt(0, list(range(8)), ascending=True) == [[expert] for expert in range(8)]
    work = [kind for kind, what in gpu.device.log if kind in ("copy", "launch")]
    # With two staging buffers one copy is always ahead of the launch, until the last.
    assert work == ["copy", "copy", *["launch", "copy"] * 6, "launch", "launch"]
    assert not gpu.device.syncs_of()
    gpu.check_counts()


def test_a_copy_over_an_expert_waits_for_its_last_use():
    gpu = GpuCache(0)
    in_ram(gpu)
    gpu.prompt(0, list(range(8)))
    before = gpu.device.log.count(("wait", "cuda:0 copy-1"))
    # One for each buffer, except for its first copy.
    assert before == 8


def test_without_the_wait_for_a_copy_the_race_is_found(monkeypatch):
    gpu = GpuCache(2)
    in_ram(gpu)
    monkeypatch.setattr(gpu.gpu_reader, "before_use", lambda blobs: None)
    with pytest.raises(AssertionError, match="not ordered"):
        gpu.token(0, [0, 1])


def test_without_the_note_of_a_use_the_race_is_found(monkeypatch):
    gpu = GpuCache(2)
    in_ram(gpu)
    monkeypatch.setattr(gpu.gpu_reader, "after_use", lambda blobs: None)
    with pytest.raises(AssertionError, match="not ordered"):
        for experts in ([0, 1], [2, 3], [4, 5]):
            gpu.token(0, experts)


def test_without_the_event_of_a_copy_the_reuse_of_its_ram_is_found(monkeypatch):
    gpu = GpuCache(2, ram=3)
    contents = inside(gpu.tier, "contents")
    end = contents.end
    monkeypatch.setattr(contents, "end", lambda use, entry, copy: end(use, entry, None))
    with pytest.raises(AssertionError, match="not ordered"):
        for experts in ([0, 1], [2, 3], [4, 5]):
            gpu.token(0, experts)


@pytest.mark.parametrize("order", ORDERS)
def test_a_guess_is_copied_in_pieces_and_evicts_nothing_until_it_is_used(order):
    gpu = GpuCache(2, order=order)
    in_ram(gpu)
    gpu.token(1, [0, 1])
    gpu.device.log.clear()
    gpu.cache.guess(1, [4, 5])
    settle(gpu, 1, 4, 5)
    assert [what for kind, what in gpu.device.log if kind == "copy"] == [EXPERT_BYTES // 4] * 8
    assert set(inside(gpu.cache, "layers")[1].cached) == {0, 1}
    gpu.token(1, [4, 0])
    assert set(inside(gpu.cache, "layers")[1].cached) == {4, 0}
    stats = gpu.cache.stats().layers[1]
    assert (stats.useful_guesses, stats.early_bytes, stats.wasted_bytes) == (
        1,
        EXPERT_BYTES,
        EXPERT_BYTES,
    )
    assert not gpu.device.syncs_of()
    gpu.check_counts()


def test_the_rest_of_a_guess_that_was_right_is_one_copy():
    gpu = GpuCache(2)
    asked, go_on = threading.Event(), threading.Event()
    in_ram(gpu)
    copy = gpu.device.copy

    def slow(target, source, stream):
        copy(target, source, stream)
        if target.numel() < EXPERT_BYTES and not asked.is_set():
            asked.set()
            assert go_on.wait(60)

    gpu.device.copy = slow
    gpu.cache.guess(1, [4])
    assert asked.wait(60)
    with gpu.cache.lease(1, [4]) as lease:
        assert not lease.ready
        go_on.set()
        gpu.use(1, lease.all())
    quarter = EXPERT_BYTES // 4
    assert [what for kind, what in gpu.device.log if kind == "copy"] == [quarter, 3 * quarter]
    gpu.check_counts()


def test_a_step_of_what_is_there_copies_nothing():
    gpu = GpuCache(2)
    in_ram(gpu)
    load = gpu.gpu_reader.load(0, 3, gpu.device.empty(EXPERT_BYTES))
    while load.remaining:
        load.step(4096)
    copied = gpu.device.copied_bytes["to device"]
    assert load.step() == 0
    assert gpu.device.copied_bytes["to device"] == copied
    assert not load.queued
    load.close()


def test_a_fill_brings_an_expert_that_the_cpu_computed():
    gpu = GpuCache(2)
    in_ram(gpu)
    gpu.token(1, [0, 1])
    gpu.token(1, [1, 0])
    assert gpu.cache.missing(1, [0, 5, 1, 6]) == [5, 6]
    gpu.cache.fill(1, 5)
    inside(gpu.cache, "monitor").wait_for(
        lambda: 5 in inside(gpu.cache, "layers")[1].cached or None, timeout_s=60
    )
    assert gpu.cache.missing(1, [5, 6]) == [6]
    gpu.token(1, [5])
    stats = gpu.cache.stats().layers[1]
    assert (stats.cpu_experts, stats.guesses, stats.misses, stats.hits) == (1, 0, 3, 3)
    assert stats.bytes_read == 3 * EXPERT_BYTES
    gpu.check_counts()


def test_there_is_one_fill_at_a_time_and_a_demand_does_not_wait_for_it():
    gpu = GpuCache(2)
    in_ram(gpu)
    go_on, begun = threading.Event(), threading.Event()
    gpu.reader.hook = lambda layer, expert: None
    copy = gpu.device.copy

    def slow(target, source, stream):
        if target.numel() < EXPERT_BYTES:
            begun.set()
            assert go_on.wait(60)
        copy(target, source, stream)

    gpu.device.copy = slow
    for expert in (4, 5, 6):
        gpu.cache.fill(1, expert)
    assert begun.wait(60)
    assert list(inside(gpu.cache, "layers")[1].staged) == [4]
    gpu.token(1, [0, 1])
    go_on.set()
    gpu.check_counts()
    assert gpu.cache.stats().layers[1].cpu_experts == 3


def test_a_failed_read_arrives_as_it_is_and_leaves_all_usable():
    gpu = GpuCache(2)

    def fail(layer, expert):
        if expert == 3:
            raise DamageError("layer 0 expert 3: cut")

    gpu.reader.hook = fail
    with pytest.raises(DamageError, match="expert 3: cut"):
        gpu.token(0, [2, 3])
    with pytest.raises(DamageError, match="expert 3: cut"):
        gpu.prompt(0, [1, 3, 4])
    gpu.check_counts()
    gpu.reader.hook = lambda layer, expert: None
    gpu.token(0, [2, 3])
    gpu.check_counts()


def test_a_copy_that_fails_arrives_as_it_is():
    gpu = GpuCache(0)
    in_ram(gpu)
    copy = gpu.device.copy
    gpu.device.copy = lambda *arguments: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        gpu.token(0, [2, 3])
    gpu.device.copy = copy
    gpu.check_counts()
    gpu.token(0, [2, 3])
    gpu.check_counts()


@pytest.mark.parametrize("at", ["copy", "use"])
def test_an_interrupt_leaves_nothing_in_use(at, monkeypatch):
    gpu = GpuCache(1)
    in_ram(gpu)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if at == "copy":
            patch.setattr(gpu.device, "copy", interrupt)
        else:
            patch.setattr(gpu, "use", interrupt)
        gpu.token(0, [2, 3])
    gpu.check_counts()
    gpu.token(0, [2, 3])
    gpu.check_counts()


def test_an_interrupt_between_two_demands_leaves_nothing_in_use(monkeypatch):
    gpu = GpuCache(1)
    in_ram(gpu)
    slots = inside(gpu.cache, "layers")[0]
    take = slots.take

    def interrupted(expert, keep):
        if expert == 3:
            raise KeyboardInterrupt
        return take(expert, keep)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slots, "take", interrupted)
        gpu.token(0, [2, 3])
    gpu.check_counts()
    gpu.token(0, [4, 3])
    gpu.check_counts()


def test_copies_from_memory_that_is_not_locked_hold_up_another_thread():
    gpu = GpuCache(2, pinnable_bytes=0)
    in_ram(gpu)
    gpu.token(0, [0, 1])
    assert not gpu.device.syncs_of()
    assert len(gpu.device.syncs_of("moe-fetch")) == 2
    gpu.check_counts()


def test_layers_are_split_between_gpus_with_a_copy_stream_each():
    gpu = GpuCache(2, devices=2)
    in_ram(gpu)
    for layer in range(4):
        gpu.token(layer, [0, 1], guess=[0, 1] if layer < 3 else ())
    assert [device.copied_bytes["to device"] for device in gpu.devices] == [4 * EXPERT_BYTES] * 2
    assert len({id(stream) for stream in inside(gpu.gpu_reader, "streams")}) == 2
    assert len(gpu.reader.asked) == 32
    gpu.check_counts()


def test_closing_ends_copies_unlocks_the_memory_and_closes_the_files():
    gpu = GpuCache(2)
    gpu.token(0, [0, 1])
    assert inside(gpu.device.machine, "pinned")
    gpu.cache.close()
    assert gpu.reader.closed
    assert not inside(gpu.device.machine, "pinned")


def test_shrinking_frees_whole_pieces_evenly_and_keeps_what_is_in_use():
    gpu = GpuCache([6, 6, 5, 5], piece_buffers=3)
    in_ram(gpu)
    for layer in range(4):
        for expert in range(6):
            gpu.token(layer, [expert, (expert + 1) % 8])
    free = gpu.device.memory()[0]
    with gpu.cache.lease(0, [4, 7]) as lease:
        for blobs in lease.parts():
            gpu.use(0, blobs)
        freed = gpu.cache.shrink(4 * EXPERT_BYTES)
        assert freed == 6 * EXPERT_BYTES
        assert gpu.cache.slots == (4, 4, 4, 4)
        gpu.use(0, lease.all())
    assert gpu.device.memory()[0] == free + freed
    assert gpu.cache.stats().slots == (4, 4, 4, 4)
    assert gpu.cache.stats().slot_bytes == 16 * EXPERT_BYTES
    for layer in range(4):
        gpu.token(layer, [0, 5])
    gpu.check_counts()


def test_shrinking_ends_where_a_token_needs_the_rest():
    gpu = GpuCache(2, piece_buffers=2)
    in_ram(gpu)
    for layer in range(4):
        gpu.token(layer, [0, 1])
    assert gpu.cache.shrink(1 << 40) == 8 * EXPERT_BYTES
    assert gpu.cache.slots == (0, 0, 0, 0)
    assert gpu.cache.shrink(1) == 0
    gpu.token(2, [3, 4])
    gpu.prompt(2, [0, 3, 4])
    gpu.check_counts()


def test_memory_is_freed_after_copies_that_nobody_used():
    gpu = GpuCache(2, piece_buffers=2)
    in_ram(gpu)
    for layer in range(4):
        with gpu.cache.lease(layer, [0, 1]):
            pass
    assert gpu.cache.shrink(1 << 40) == 8 * EXPERT_BYTES
    gpu.check_counts()


def test_shrinking_one_gpu_leaves_the_other_alone():
    gpu = GpuCache(4, devices=2)
    in_ram(gpu)
    assert gpu.cache.shrink(1, layer=3) == 3 * EXPERT_BYTES
    assert gpu.cache.slots[:2] == (4, 4)
    assert sum(gpu.cache.slots[2:]) == 5


RANDOM = [
    (seed, *case)
    for seed, case in enumerate(
        [
            ("late", 0, None, "lru"),
            ("late", 1, 4, "lrfu"),
            ("late", 3, 5, "lfu"),
            ("late", 8, None, "lrfu"),
            ("early", 1, 4, "lrfu"),
            ("early", 3, None, "lru"),
            (0, 0, 4, "lrfu"),
            (1, 1, 2, "lru"),
            (2, 2, 5, "lfu"),
            (3, 3, None, "lrfu"),
            (4, 4, 6, "lrfu"),
            (5, 8, 4, "lru"),
        ]
    )
]


@pytest.mark.parametrize(("seed", "order", "slots", "ram", "policy"), RANDOM)
@pytest.mark.parametrize("devices", [1, 2])
def test_whatever_is_asked_for_in_whatever_order_finds_its_bytes(
    seed, order, slots, ram, policy, devices
):
    choose = random.Random(seed)
    sizes = [EXPERT_BYTES, EXPERT_BYTES, 2 * EXPERT_BYTES, EXPERT_BYTES]
    gpu = GpuCache(
        slots, order=order, ram=ram, policy=POLICIES[policy], devices=devices, sizes=sizes
    )

    def draw(count):
        """Draw experts as a router does: some are used more than others."""
        return choose.sample([0, 1, 2, 3, 4, 5, 6, 7], count, counts=[6, 5, 3, 2, 1, 1, 1, 1])

    for _ in range(60):
        for layer in range(4):
            kind = choose.random()
            experts = list(dict.fromkeys(draw(2)))
            guess = list(dict.fromkeys(draw(2))) if layer < 3 and choose.random() < 0.7 else []
            if kind < 0.1:
                gpu.prompt(layer, list(dict.fromkeys(draw(7))), ascending=choose.random() < 0.5)
            elif kind < 0.15:
                parts = gpu.cache.stream(layer, list(dict.fromkeys(draw(7))), (), ascending=False)
                gpu.use(layer, next(parts))
                parts.close()
            elif kind < 0.2:
                gpu.reader.hook = fail
                with contextlib.suppress(DamageError):
                    gpu.token(layer, experts)
                gpu.reader.hook = lambda layer, expert: None
            elif kind < 0.25:
                for expert in gpu.cache.missing(layer, experts):
                    with gpu.tier.use(layer, expert) as use:
                        while not use.has_bytes:
                            use.step(4096)
                        gpu.device.host_reads(use.blob)
                    gpu.cache.fill(layer, expert)
            elif kind < 0.26:
                gpu.cache.shrink(choose.randrange(5) * EXPERT_BYTES, layer=layer)
            elif kind < 0.3:
                with gpu.cache.lease(layer, experts):
                    pass
            else:
                gpu.token(layer, experts, guess)
    gpu.check_counts()
    if slots and slots < 8:
        assert gpu.cache.stats().total.hits > 0


def fail(layer, expert):
    if expert > 3:
        raise DamageError(f"layer {layer} expert {expert}: cut")


@pytest.mark.parametrize("order", ["late", 0])
def test_threads_share_a_gpu(order):
    gpu = GpuCache(2, order=order, ram=12)
    wrong = []

    def work(seed):
        choose = random.Random(seed)
        try:
            for _ in range(60):
                layer, experts = choose.randrange(3), choose.sample(range(8), 2)
                if seed % 3:
                    gpu.token(layer, experts, choose.sample(range(8), 2))
                else:
                    gpu.prompt(layer, choose.sample(range(8), 5))
                if seed == 1 and choose.random() < 0.05:
                    gpu.cache.shrink(EXPERT_BYTES)
        except BaseException as e:
            wrong.append(e)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong
    gpu.check_counts()


def test_each_expert_is_read_once_where_the_tier_holds_all():
    gpu = GpuCache(1)
    for _ in range(3):
        for layer in range(4):
            for expert in range(0, 8, 2):
                gpu.token(layer, [expert, expert + 1])
    assert sorted((layer, expert) for layer, expert, *_ in gpu.reader.asked) == sorted(
        chain.from_iterable([(layer, expert) for expert in range(8)] for layer in range(4))
    )
    ram = gpu.cache.stats().ram
    assert (ram.misses, ram.evictions, ram.bytes_read) == (32, 0, 32 * EXPERT_BYTES)
    assert ram.hits == gpu.cache.stats().total.misses - 32
