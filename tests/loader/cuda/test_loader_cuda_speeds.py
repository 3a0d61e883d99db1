import pytest
import torch
from inside import inside
from recording_device import RecordingDevice

from loader.arithmetic import machine
from loader.cuda.device import speeds


def test_the_link_is_measured_by_page_locked_copies_of_whole_blocks():
    device = RecordingDevice()
    assert speeds.link_bytes_per_s(device, 5000, seconds=0) > 0
    assert {entry for entry in device.log if entry[0] == "copy"} == {("copy", 8192)}
    assert device.copied_bytes["to host"] == 0
    assert not [what for what in device.syncs_of() if "pageable" in what]


def test_a_copy_that_is_not_counted_comes_before_the_clock_starts(monkeypatch):
    device = RecordingDevice()
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert speeds.link_bytes_per_s(device, 4096, seconds=1) == inside(speeds, "BATCH") * 4096 / 2
    assert device.copied_bytes["to device"] == (1 + inside(speeds, "BATCH")) * 4096


def test_a_copy_within_the_gpu_reads_and_writes(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    device = RecordingDevice(capacity_bytes=1 << 20)
    assert (
        speeds.memory_bytes_per_s(device, seconds=1) == inside(speeds, "BATCH") * 2 * (1 << 18) / 2
    )


def test_measuring_leaves_no_page_locked_and_no_gpu_memory():
    device = RecordingDevice(pinnable_bytes=8192)
    for _ in range(2):
        speeds.link_bytes_per_s(device, 8192, seconds=0)
        speeds.memory_bytes_per_s(RecordingDevice(capacity_bytes=1 << 20), seconds=0)
    assert device.pinnable_bytes == 8192
    assert device.memory()[0] == device.capacity_bytes
    assert device.races == []


def test_where_nothing_can_be_page_locked_the_link_is_measured_without():
    device = RecordingDevice(pinnable_bytes=0)
    assert speeds.link_bytes_per_s(device, 4096, seconds=0) > 0
    assert [what for what in device.syncs_of() if "pageable" in what]


def test_gpu_memory_is_measured_within_what_is_free():
    device = RecordingDevice(capacity_bytes=1 << 20)
    held = device.empty(1 << 19)
    assert speeds.memory_bytes_per_s(device, seconds=0) > 0
    assert device.memory()[0] == 1 << 19
    del held


def test_a_block_that_does_not_fit_the_gpu_is_out_of_memory():
    with pytest.raises(torch.OutOfMemoryError):
        speeds.link_bytes_per_s(RecordingDevice(capacity_bytes=4096), 8192)
