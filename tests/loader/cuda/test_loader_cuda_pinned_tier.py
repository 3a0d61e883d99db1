import logging
import threading

import pytest
import torch
from inside import inside
from pattern_reader import EXPERT_BYTES, PatternReader
from recording_device import RecordingDevice

from formats.errors import DamageError
from loader.budget.slot_counts import tier_counts
from loader.cuda.experts.pinned_tier import PinnedTier


def tier_of(count, *, sizes=(EXPERT_BYTES,) * 2, device=None, piece_buffers=2):
    """Return (tier, reader, device)."""
    device = device or RecordingDevice()
    reader = PatternReader(list(sizes), 8, device)
    counts = count if isinstance(count, dict) else {size: count for size in sizes}
    tier = PinnedTier(
        reader, counts, device.pin, device.unpin, piece_bytes=piece_buffers * EXPERT_BYTES
    )
    return tier, reader, device


def patterns(tier):
    """Return the bytes of each expert by (layer, expert)."""
    return inside(inside(inside(tier, "contents"), "reader"), "patterns")


def get(tier, layer, expert, at_most=None):
    """Read an expert, check its bytes, and end the use."""
    with tier.use(layer, expert) as use:
        while not use.has_bytes:
            use.step(at_most)
        assert torch.equal(use.blob, patterns(tier)[layer, expert])


def test_an_expert_that_is_there_is_not_read_again():
    tier, reader, _ = tier_of(4)
    for _ in range(3):
        get(tier, 0, 5)
    assert reader.asked == [(0, 5, 0, EXPERT_BYTES)]
    stats = tier.stats()
    assert (stats.hits, stats.misses, stats.bytes_read, stats.buffer_bytes) == (
        2,
        1,
        EXPERT_BYTES,
        4 * EXPERT_BYTES,
    )
    tier.reset_stats()
    assert (tier.stats().hits, tier.stats().buffer_bytes) == (0, 4 * EXPERT_BYTES)


def test_it_is_read_in_pieces_that_are_asked_for():
    tier, reader, _ = tier_of(4)
    get(tier, 0, 5, at_most=4096)
    assert [begin for _, _, begin, _ in reader.asked] == [0, 4096, 8192, 12288]


def test_the_least_used_of_all_layers_leaves():
    tier, _, _ = tier_of(3)
    for layer, expert in ((0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (1, 1), (0, 2)):
        get(tier, layer, expert)
    assert tier.find(0, 1) is tier.find(1, 1) is None
    assert tier.stats().evictions == 2
    for layer in (0, 1):
        with tier.find(layer, 0) as use:
            assert use.has_bytes


def test_what_is_in_use_does_not_leave():
    tier, _, _ = tier_of(2)
    with tier.use(0, 0) as held:
        held.step()
        for expert in range(1, 6):
            get(tier, 1, expert)
        assert torch.equal(held.blob, patterns(tier)[0, 0])


def test_experts_of_different_sizes_do_not_take_each_others_room():
    sizes = (EXPERT_BYTES, 2 * EXPERT_BYTES)
    tier, reader, _ = tier_of({sizes[0]: 2, sizes[1]: 8}, sizes=sizes)
    for expert in range(8):
        get(tier, 0, expert)
        get(tier, 1, expert)
    reader.asked.clear()
    for expert in range(8):
        get(tier, 1, expert)
    assert not reader.asked


def test_memory_is_locked_piece_by_piece_when_it_is_first_used():
    tier, _, device = tier_of(6)
    assert not device.log
    for expert in range(5):
        get(tier, 0, expert)
        assert len(device.log) == expert // 2 + 1
    assert device.log == [("pin", 2 * EXPERT_BYTES)] * 3
    tier.close()
    assert not inside(device.machine, "pinned")


def test_refused_locks_are_said_once_and_change_nothing_else(caplog):
    tier, _, _ = tier_of(6, device=RecordingDevice(pinnable_bytes=2 * EXPERT_BYTES))
    with caplog.at_level(logging.WARNING):
        for expert in range(6):
            get(tier, 0, expert)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "page-locked" in caplog.text
    with tier.find(0, 0) as first, tier.find(0, 5) as last:
        assert first.is_pinned
        assert not last.is_pinned


def test_a_use_that_is_given_up_halfway_leaves_its_room():
    tier, reader, _ = tier_of(2)
    for expert in range(6):
        use = tier.use(0, expert)
        use.step(4096)
        use.close()
    assert tier.find(0, 0) is None
    get(tier, 0, 0)
    assert [begin for _, _, begin, _ in reader.asked] == [0] * 7


def test_an_expert_that_two_want_is_read_once():
    tier, reader, _ = tier_of(4)
    first, second = tier.use(0, 3), tier.use(0, 3)
    first.step(4096)
    second.step(8192)
    first.step()
    assert second.has_bytes
    first.close()
    second.close()
    assert [(begin, end) for _, _, begin, end in reader.asked] == [
        (0, 4096),
        (4096, 12288),
        (12288, EXPERT_BYTES),
    ]
    assert tier.stats().misses == 1


def test_two_threads_that_want_the_same_get_it_once():
    tier, reader, _ = tier_of(4)
    reading, go_on = threading.Event(), threading.Event()
    reader.hook = lambda layer, expert: (reading.set(), go_on.wait(60))
    threads = [threading.Thread(target=get, args=(tier, 0, 3)) for _ in range(2)]
    threads[0].start()
    assert reading.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(reader.asked) == 1


def test_a_failed_read_is_raised_as_it_is_and_leaves_its_room():
    tier, reader, _ = tier_of(2)

    def fail(layer, expert):
        raise DamageError("layer 0 expert 3: cut")

    reader.hook = fail
    for _ in range(4):
        with pytest.raises(DamageError, match="expert 3: cut"):
            get(tier, 0, 3)
    reader.hook = lambda layer, expert: None
    for expert in range(4):
        get(tier, 0, expert)


def test_a_full_tier_waits_for_the_oldest_copy_and_no_other():
    tier, _, device = tier_of(2)
    copies = device.new_stream()
    events, targets = [], []
    for expert in (0, 1):
        use = tier.use(0, expert)
        use.step()
        targets.append(device.empty(EXPERT_BYTES))
        events.append(device.new_event())
        events[-1].record(device.compute_stream())
        copies.wait_event(events[-1])
        device.copy(targets[-1], use.blob, copies)
        events[-1].record(copies)
        use.close(events[-1])
    get(tier, 0, 2)
    assert len(device.syncs_of()) == 1
    assert events[0].query()
    assert not events[1].query()


def test_a_full_tier_waits_until_a_use_ends():
    tier, _, _ = tier_of(2)
    held = [tier.use(0, expert) for expert in (0, 1)]
    for use in held:
        use.step()
    thread = threading.Thread(target=get, args=(tier, 1, 4))
    thread.start()
    held[0].close()
    thread.join(60)
    assert not thread.is_alive()
    assert tier.find(0, 0) is None
    assert tier.find(0, 1) is not None


def test_a_use_without_its_bytes_is_refused():
    tier, _, _ = tier_of(2)
    with pytest.raises(RuntimeError, match="layer 0 expert 1"):
        _ = tier.use(0, 1).blob


def test_a_budget_for_all_holds_all_and_a_smaller_one_the_same_share_of_each_size():
    small, large = EXPERT_BYTES, 2 * EXPERT_BYTES
    artifact = tier_of(8, sizes=(small, small, large))[1].artifact
    everything = 16 * small + 8 * large
    assert tier_counts(everything, artifact, 2) == {small: 16, large: 8}
    assert tier_counts(everything // 2, artifact, 2) == {small: 7, large: 4}
    least = 2 * (small + large)
    assert tier_counts(least, artifact, 2) == {small: 2, large: 2}
    for budget in range(least, everything, 1000):
        assert (
            sum(size * count for size, count in tier_counts(budget, artifact, 2).items()) <= budget
        )
