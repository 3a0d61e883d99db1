"""The recording device finds each kind of race, and reports nothing else."""

import threading

import pytest
import torch
from recording_device import RecordingDevice

from formats.reading.reader import aligned_bytes

N_BYTES = 4096


@pytest.fixture(params=["late", "early", 0])
def device(request):
    return RecordingDevice(order=request.param)


@pytest.fixture
def copies(device):
    return device.new_stream()


def slot(device, copies):
    """Return device memory that the copy stream may write to."""
    memory = device.empty(N_BYTES)
    copies.wait_event(event_on(device, device.compute_stream()))
    return memory


def pinned(device, value=1):
    memory = aligned_bytes(N_BYTES)
    assert device.pin(memory)
    device.host_writes(memory)
    return memory.fill_(value)


def event_on(device, stream):
    event = device.new_event()
    event.record(stream)
    return event


def use_after(device, copies, blob):
    device.compute_stream().wait_event(event_on(device, copies))
    device.touch("experts", reads=[blob])


def test_a_copy_that_is_waited_for_is_there(device, copies):
    blob = slot(device, copies)
    device.copy(blob, pinned(device), copies)
    use_after(device, copies, blob)
    assert blob.eq(1).all()
    assert not device.synchronisations


def test_a_launch_before_the_wait_for_its_copy_is_found(device, copies):
    blob = slot(device, copies)
    device.copy(blob, pinned(device), copies)
    with pytest.raises(
        AssertionError,
        match=r"experts #\d+ \(read on .*compute\) is not ordered after copy of 4096 bytes",
    ):
        device.touch("experts", reads=[blob])
    assert len(device.races) == 1


def test_a_wait_for_an_earlier_point_is_not_enough(device, copies):
    blob = slot(device, copies)
    early = event_on(device, copies)
    device.copy(blob, pinned(device), copies)
    device.compute_stream().wait_event(early)
    with pytest.raises(AssertionError, match="not ordered"):
        device.touch(reads=[blob])


def test_an_event_that_is_recorded_again_moves_and_earlier_waits_do_not(device, copies):
    blob, event = slot(device, copies), device.new_event()
    event.record(copies)
    device.compute_stream().wait_event(event)
    device.copy(blob, pinned(device), copies)
    event.record(copies)
    with pytest.raises(AssertionError, match="not ordered"):
        device.touch(reads=[blob])
    device.compute_stream().wait_event(event)
    device.touch(reads=[blob])


def test_a_copy_into_a_slot_that_a_launch_reads_is_found(device, copies):
    blob, source = slot(device, copies), pinned(device)
    device.copy(blob, source, copies)
    use_after(device, copies, blob)
    with pytest.raises(
        AssertionError, match=r"copy of .* is not ordered after experts #\d+ \(read"
    ):
        device.copy(blob, source, copies)
    copies.wait_event(event_on(device, device.compute_stream()))
    device.copy(blob, source, copies)


def test_a_part_of_a_slot_is_enough_for_a_race(device, copies):
    blob, source = slot(device, copies), pinned(device)
    device.copy(blob[1024:2048], source[:1024], copies)
    device.touch(reads=[blob[:1024], blob[2048:]])
    with pytest.raises(AssertionError):
        device.touch(reads=[blob[2047:]])


def test_a_second_copy_on_another_stream_is_found(device, copies):
    blob, source, other = slot(device, copies), pinned(device), device.new_stream()
    device.copy(blob, source, copies)
    with pytest.raises(AssertionError, match="copy-1"):
        device.copy(blob, source, other)
    other.wait_event(event_on(device, copies))
    device.copy(blob, source, other)


def test_a_buffer_that_is_reused_before_its_copy_is_done_is_found(device, copies):
    blob, source = slot(device, copies), pinned(device)
    device.copy(blob, source, copies)
    with pytest.raises(
        AssertionError, match=r"read #\d+ \(write on host\) is not ordered after copy"
    ):
        device.host_writes(source, "read")
    event_on(device, copies).synchronize()
    device.host_writes(source, "read")


def test_what_an_event_says_is_over_is_over(device, copies):
    blob, source = slot(device, copies), pinned(device)
    device.copy(blob, source, copies)
    event = event_on(device, copies)
    if event.query():
        device.host_writes(source)
    else:
        with pytest.raises(AssertionError):
            device.host_writes(source)


def test_the_host_may_read_what_a_copy_reads(device, copies):
    blob, source = slot(device, copies), pinned(device)
    device.copy(blob, source, copies)
    device.host_reads(source)


def test_an_answer_that_is_read_before_it_came_is_found_and_is_not_there(device):
    answer, choice = pinned(device, 0), device.empty(N_BYTES)
    device.touch("router", writes=[choice])
    choice.fill_(7)
    device.copy(answer, choice, device.compute_stream())
    with pytest.raises(AssertionError, match="host"):
        device.host_reads(answer)
    if device.order == "late":
        assert answer.eq(0).all()
    # Later work of the stream does not change it.
    choice.fill_(9)
    event_on(device, device.compute_stream()).synchronize()
    device.host_reads(answer)
    assert answer.eq(7).all()


def test_late_copies_wait_until_somebody_does(copies, device):
    blob, source = slot(device, copies), pinned(device)
    device.copy(blob, source, copies)
    event = event_on(device, copies)
    if device.order == "late":
        assert not event.query()
        assert blob.ne(1).any()
    event.synchronize()
    assert event.query()
    assert blob.eq(1).all()


def test_a_stream_does_its_work_in_order_whatever_it_is_forced_to():
    for seed in range(20):
        device = RecordingDevice(order=seed)
        copies = device.new_stream()
        blob = slot(device, copies)
        for value in range(1, 8):
            device.copy(blob, pinned(device, value), copies)
        use_after(device, copies, blob)
        assert blob.eq(7).all()


def test_fresh_memory_may_still_be_in_use(device, copies):
    with pytest.raises(AssertionError, match="earlier use"):
        device.copy(device.empty(N_BYTES), pinned(device), copies)


def test_memory_that_is_freed_while_a_copy_writes_it_is_found(device, copies):
    blob = slot(device, copies)
    device.copy(blob, pinned(device), copies)
    # The copy is done, but the compute stream waits for no event that shows it.
    copies.run_until(copies.given)
    del blob
    with pytest.raises(AssertionError, match="next use"):
        device.memory()


def test_memory_whose_copy_is_over_may_be_freed(device, copies):
    blob = slot(device, copies)
    device.copy(blob, pinned(device), copies)
    device.compute_stream().wait_event(event_on(device, copies))
    del blob
    assert device.memory()[0] == device.capacity_bytes


def test_memory_is_counted_and_ends():
    device = RecordingDevice(capacity_bytes=3 * N_BYTES)
    first, second = device.empty(N_BYTES), device.empty(2 * N_BYTES)
    assert first.data_ptr() % 256 == second.data_ptr() % 256 == 0
    with pytest.raises(torch.OutOfMemoryError):
        device.empty(1)
    part = second[:16]
    del second
    assert device.memory() == (0, 3 * N_BYTES)
    del part
    assert device.memory() == (2 * N_BYTES, 3 * N_BYTES)


def test_a_copy_from_pageable_memory_makes_the_host_wait(device, copies):
    blob, source = slot(device, copies), aligned_bytes(N_BYTES)
    device.copy(blob, source, copies)
    assert [what for what in device.syncs_of() if "pageable" in what]
    device.host_writes(source)


def test_refused_pins_leave_memory_pageable():
    device = RecordingDevice(pinnable_bytes=N_BYTES)
    first, second = aligned_bytes(N_BYTES), aligned_bytes(N_BYTES)
    assert device.pin(first)
    assert not device.pin(second)
    device.unpin(first)
    assert device.pin(second)


def test_synchronisations_are_counted_by_thread(device, copies):
    event = event_on(device, copies)
    event.synchronize()
    thread = threading.Thread(target=copies.synchronize, name="other")
    thread.start()
    thread.join()
    assert len(device.syncs_of()) == len(device.syncs_of("other")) == 1


def test_devices_of_one_machine_share_its_pinned_memory_and_its_host(device, copies):
    other = RecordingDevice(order=device.order, name="cuda:1", beside=device)
    source, stream = pinned(device), other.new_stream()
    blob = slot(other, stream)
    other.copy(blob, source, stream)
    with pytest.raises(AssertionError, match="cuda:1 copy"):
        device.host_writes(source)
    stream.synchronize()
    device.host_writes(source)


def test_kernels_run_and_are_checked(device, copies):
    x = slot(device, copies)
    device.copy(x, pinned(device, 0), copies)
    out = torch.zeros(16 * 80, dtype=torch.uint8)
    launch = device.prepare(
        "quantize_f32", (2, 1, 1), 128, (x.view(torch.float32), 1024, out), reads=[x]
    )
    with pytest.raises(AssertionError, match="quantize_f32"):
        launch()
    device.compute_stream().wait_event(event_on(device, copies))
    launch()
    assert device.log[-1] == ("launch", "quantize_f32")
    assert device.copied_bytes == {"to device": N_BYTES, "to host": 0}
