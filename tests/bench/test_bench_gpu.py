"""bench/gpu/run.py: its arithmetic, and its sections without a GPU."""

import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import gpu_sections
import pytest
import torch
from cuda_host import COMPILER
from gpu_clock import EventClock, Time, median_time
from gpu_decode import (
    PAIRS,
    Decoding,
    compare,
    loaded,
    profile,
    resident,
    share_of_link,
    token_bytes,
)
from gpu_gaps import Interval, busy_us, gaps, intervals_of
from gpu_kernels import DeviceCopy, beside_copy, kernels, link, overlap
from gpu_report import SMI_FIELDS, bars, line, parse_smi
from make_checkpoint import SHAPES
from make_folder import kept_folder
from recording_device import RecordingDevice

import loader
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.expert import ExpertLayout
from formats.packing import PACKINGS
from loader.arithmetic import kernels as native
from loader.cuda.experts.cpu_share import Speeds

on_host = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
MINI = SHAPES["mini"]
Q2 = PACKINGS["tile32-q2-g16-s4"]
LAYOUT = ExpertLayout(MINI.hidden, MINI.intermediate, Q2, Q2)


class CountingClock:
    """Takes a millisecond for each call."""

    def __init__(self, device):
        self._device = device

    def time(self, call, calls):
        for i in range(calls):
            call(i)
        self._device.compute_stream().synchronize()
        return Time(calls * 1e-3, True)


class ListedClock:
    """Takes the given seconds, one after the other."""

    def __init__(self, *times):
        self._times = iter(times)

    def time(self, call, calls):
        return next(self._times)


# Arithmetic.


def test_a_median_leaves_the_first_time_out_and_is_of_one_call():
    clock = ListedClock(Time(99, True), Time(4, True), Time(8, True), Time(6, True))
    assert median_time(clock, print, 2, 3) == Time(3, True)
    assert not median_time(
        ListedClock(Time(1, True), Time(1, True), Time(1, False)), print, 1, 2
    ).queued


def test_a_kernel_counts_what_it_reads_and_a_copy_both_ways():
    copy = DeviceCopy(RecordingDevice(capacity_bytes=1 << 16))
    assert copy.n_bytes == 2 * (1 << 13)
    clock = ListedClock(
        *[Time(9, True)] * 2, Time(2, True), Time(copy.n_bytes * copy.calls / 1e9, True)
    )
    row = beside_copy(clock, print, 10, 10**8, copy, 1)
    assert row == pytest.approx(
        {"us": 2e5, "gb_s": 0.5, "copy_gb_s": 1.0, "share": 0.5, "queued": True}
    )


def test_the_link_allows_so_many_tokens_as_their_misses_go_over_it():
    row = {"tokens_per_s": 85.0, "misses_per_token": 4.0}
    assert share_of_link(row, link_bytes_per_s=10e9, expert_bytes=25_000_000) == 0.85
    assert share_of_link(row | {"misses_per_token": 0}, 10e9, 25_000_000) is None


def test_time_is_busy_while_anything_runs_and_counted_once():
    intervals = [
        Interval(0, 4, "copy", "a"),
        Interval(2, 6, "kernel", "b"),
        Interval(3, 5, "kernel", "c"),
        Interval(8, 9, "kernel", "d"),
        Interval(9, 30, "copy", "e"),
    ]
    assert busy_us(intervals, 0, 10) == 6 + 1 + 1
    assert busy_us(intervals, 5, 8.5) == 1.5
    assert busy_us([], 0, 10) == 0


def layer(begin, norm, attention, experts, copies=()):
    """Return a layer's kernels, 1 µs apart from `begin` on, and copies to the GPU during them."""
    names = [
        ("add_norm_bf16", norm),
        ("attend_bf16", attention),
        ("attend_combine", 1),
        ("add_norm_bf16", norm),
        ("down_token_q2_g16_s4", experts),
    ]
    for name, us in names:
        yield Interval(begin, begin + us, "kernel", name)
        begin += us + 1
    for at, end in copies:
        yield Interval(at, end, "copy", "Memcpy HtoD (Pinned -> Device)")


def test_gaps_are_by_layer_of_each_token_and_the_last_one_has_the_way_to_the_next():
    trace = []
    for token in range(3):
        at = 100 * token
        trace += [*layer(at, 1, 2, 5, [(at + 10, at + 40)]), *layer(at + 50, 1, 2, 5)]
    first, second, whole = gaps(sorted(trace), layers=2)
    assert (first["us"], second["us"], whole["us"]) == (50, 50, 100)
    # 10 µs of kernels, of which 4 lie in a copy of 30.
    assert first["idle_us"] == 50 - 36 and second["idle_us"] == 40
    assert (
        first["copy_share"] == 0.6
        and first["kernel_share"] == 0.2
        and second["idle_share"] == pytest.approx(0.8)
    )
    assert whole["idle_us"] == first["idle_us"] + second["idle_us"] and whole["layer"] == "token"


def test_no_gaps_are_told_of_half_tokens_and_of_other_kernels():
    assert (
        gaps(sorted([*layer(0, 1, 2, 5), *layer(50, 1, 2, 5), *layer(100, 1, 2, 5)]), layers=2)
        == []
    )
    assert gaps([Interval(0, 1, "kernel", "ampere_gemm")] * 4, layers=1) == []


def test_a_trace_gives_kernels_and_copies_of_the_gpu_alone():
    events = [
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 5.0, "dur": 2.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 1.0, "dur": 3.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 9.0},
        {"ph": "s", "cat": "kernel", "name": "flow", "ts": 0.0},
        {"ph": "M", "name": "process_name"},
    ]
    expected = [Interval(1, 4, "copy", "Memcpy HtoD"), Interval(5, 7, "kernel", "k")]
    assert intervals_of({"traceEvents": events}) == expected


# The report.


def test_the_worst_row_decides_a_bar_and_what_was_not_measured_is_said():
    kernels = [
        {"what": "experts", "tokens": 1, "share": 0.9},
        {"what": "experts", "tokens": 1, "share": 0.69},
        {"what": "experts", "tokens": 2, "share": 0.1},
        {"what": "experts", "tokens": 64},
    ]
    on, off = (
        {"cpu_share": "off", "share_of_link": 0.86},
        {"cpu_share": "auto", "share_of_link": 0.5},
    )
    decode = [
        {"pair": "prefetch", "ratio": 1.1, "b": on},
        {"pair": "prefetch, CPU share on", "ratio": 0.9, "b": off},
        {"pair": "CPU share", "ratio": 0.2, "b": off},
    ]
    experts, attention, bound, prefetch = bars({"kernels": kernels, "decode": decode})
    assert (experts.value, experts.met) == (0.69, False) and str(experts).startswith("NOT MET")
    assert attention.met is None and "not measured" in str(attention)
    assert (bound.value, bound.met) == (0.86, True)
    assert (prefetch.value, prefetch.met) == (0.9, False)
    assert [bar.met for bar in bars({})] == [None] * 4


def test_a_row_is_one_line_with_what_is_nested():
    row = {
        "pair": "prefetch",
        "ratio": 1.23456,
        "ratios": [1.2, 1.3],
        "b": {"tokens_per_s": 12345.6, "share": None},
    }
    expected = (
        "decode    pair prefetch  ratio 1.235  ratios 1.2,1.3  b.tokens_per_s 12346  b.share None"
    )
    assert line("decode", row) == expected


def test_nvidia_smi_is_read_for_the_gpu_that_is_measured():
    values = ["GPU-1", "580.1", "4", "5", "16", "16", "[N/A]", "70.00"], ["GPU-2", *"abcdefg"]
    text = "\n".join(", ".join(row) for row in values)
    assert parse_smi(text, "1") == dict(zip(SMI_FIELDS[1:], values[0][1:], strict=True))
    assert parse_smi(text, "GPU-2")["driver_version"] == "a"
    assert parse_smi(text, "3") == parse_smi("NVIDIA-SMI has failed", "1") == {}


def test_a_section_that_fails_is_told_of_and_the_others_are_stored(capsys):
    stored, result = [], {}

    def fails():
        yield {"x": 1}
        raise RuntimeError("illegal address")

    sections = [("kernels", fails), ("link", lambda: [{"gb_s": 2.0}])]
    assert not gpu_sections.run(sections, result, lambda: stored.append(json.dumps(result)))
    assert result["kernels"] == [{"x": 1}] and result["link"] == [{"gb_s": 2.0}]
    assert "illegal address" in result["failed"]["kernels"] and "link" not in result["failed"]
    assert len(stored) == 2 and json.loads(stored[-1]) == result
    assert "FAILED: illegal address" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_it_needs():
    command = [sys.executable, Path(gpu_sections.__file__).with_name("run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "needs one of compute capability 7.0" in done.stderr


# The sections.


def test_the_link_is_measured_by_page_locked_copies_of_an_expert_and_let_go():
    device = RecordingDevice(pinnable_bytes=10 * 4096)
    row = link(device, CountingClock(device), 5000, repeats=3)
    assert row == {"bytes": 8192, "page_locked": False} | dict.fromkeys(
        ("gb_s", "least_gb_s", "most_gb_s"), pytest.approx(8192 / 1e-3 / 1e9)
    )
    assert device.pinnable_bytes == 10 * 4096 and not device.races
    device = RecordingDevice()
    assert link(device, CountingClock(device), 5000, repeats=3)["page_locked"]
    assert not [what for what in device.syncs_of() if "pageable" in what]


@on_host
def test_kernels_are_measured_in_every_packing_for_few_and_many_tokens():
    device = RecordingDevice(capacity_bytes=1 << 26)
    packings = [Q2, PACKINGS["tile32-q4-g64-s8"]]
    rows = list(
        kernels(
            device,
            CountingClock(device),
            MINI,
            packings,
            4 * LAYOUT.n_bytes,
            (1, 2),
            (16,),
            pairs=1,
        )
    )
    found = [(row["what"], row["packing"], row["tokens"]) for row in rows]
    assert found == [
        (w, p.name, t) for p in packings for w in ("experts", "attention") for t in (1, 2, 16)
    ]
    experts = rows[0]
    assert experts["gb_s"] == pytest.approx(2 * LAYOUT.n_bytes / 1e-3 / 1e9)
    assert experts["copy_gb_s"] == pytest.approx(2 * (1 << 26 >> 3) / 1e-3 / 1e9)
    assert rows[2]["weights_tokens_t_s"] == pytest.approx(2 * 3 * 64 * 96 * 16 / 1e-3 / 1e12)
    assert rows[5]["weights_tokens_t_s"] == pytest.approx(
        (64 + 32 + 32 + 64) * 64 * 16 / 1e-3 / 1e12
    )
    assert not device.races


@on_host
def test_overlap_orders_copies_and_kernels_by_events_alone():
    device = RecordingDevice(order=3)
    row = overlap(device, CountingClock(device), LAYOUT, 4 * LAYOUT.n_bytes, copies=2, most=3)
    assert row["layers"] == 1 and row["ratio"] == 1 and not device.races
    assert {what for what in device.syncs_of()} == {"cuda:0 compute"}


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "mini-2bit"
    convert_checkpoint(source, out, make_recipe("2bit", solver="hqq"))
    return out


@pytest.fixture
def load(folder):
    return partial(loader.from_pretrained, folder, device=RecordingDevice(), ram_cache="1TiB")


@on_host
def test_decoding_is_compared_in_turn_with_the_link_measured_before(load):
    rows = list(
        compare(load, Decoding(3, 2), [2] * 3, ["prefetch"], LAYOUT.n_bytes, lambda: 5e9, rounds=2)
    )
    (row,) = rows
    a, b = row["a"], row["b"]
    assert (row["pair"], row["slots"], row["link_gb_s"]) == ("prefetch", 2, 5.0) and len(
        row["ratios"]
    ) == 2
    assert (
        a["misses_per_token"] > 0
        and a["link_bytes_per_token"] == a["misses_per_token"] * LAYOUT.n_bytes
    )
    assert a["share_of_link"] == pytest.approx(a["tokens_per_s"] * a["link_bytes_per_token"] / 5e9)
    assert a["least_slots"] == b["least_slots"] == 2
    assert (a["prefetch"], a["recall"]) == (0, 0) and b["prefetch"] == "auto" and b["recall"] > 0


@on_host
def test_all_experts_on_the_gpu_read_the_weights_of_a_token(load):
    with loaded(load, slots=[4] * 3, prefetch=0, cpu_share="off") as model:
        row = resident(model, Decoding(3, 32), LAYOUT.n_bytes, 10.0, rounds=1)
        attention = sum(
            PACKINGS["tile32-q4-g64-s8"].matrix_bytes(rows, 64) for rows in (64, 32, 32, 64)
        )
        assert (
            token_bytes(model, LAYOUT.n_bytes)
            == 3 * (2 * LAYOUT.n_bytes + attention) + 4096 * 64 * 2
        )
        assert row["gb_s"] == pytest.approx(
            row["tokens_per_s"] * token_bytes(model, LAYOUT.n_bytes) / 1e9
        )
        assert row["misses_per_token"] == 0 and row["share"] == row["gb_s"] / 10


@on_host
def test_the_profiler_runs_while_tokens_are_decoded(load):
    with loaded(load, slots=[2] * 3, prefetch="auto", cpu_share="off") as model:
        assert profile(model, Decoding(3, 4), torch.profiler.ProfilerActivity.CPU) == []


@on_host
def test_the_whole_command_makes_its_model_and_fills_every_section(monkeypatch, tmp_path):
    device = RecordingDevice(capacity_bytes=1 << 26)
    options = Namespace(layers=2, tokens=3, prompt=4, rounds=1, slots=[2], work=tmp_path)
    gap = {"layer": "token", "idle_share": 0.5}
    device.index = 0
    for name, value in {
        "SHAPE": MINI, "LAYOUT": LAYOUT, "EventClock": lambda index: CountingClock(device),
        "ring_bytes": lambda device: 4 * LAYOUT.n_bytes, "profile": lambda model, decoding: [gap],
        "kernels": partial(kernels, few=(1,), many=(16,), pairs=1),
        "kept_folder": partial(
            kept_folder, hidden=MINI.hidden, intermediate=MINI.intermediate, heads=MINI.heads,
            kv_heads=MINI.kv_heads, head_dim=16, experts=MINI.experts,
        ),
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu_sections, name, value)
    monkeypatch.setattr(Speeds, "measured", lambda device, expert_bytes: Speeds(1e9, 1e9))
    bench, result = gpu_sections.Bench(device, options), {}
    sections = [(name, getattr(bench, name)) for name in gpu_sections.SECTIONS]
    assert gpu_sections.run(sections, result, lambda: None), result["failed"]
    counts = {name: len(result[name]) for name in gpu_sections.SECTIONS}
    pairs = len(PAIRS) if native.available() else 1
    assert counts == {
        "check": 1,
        "link": 1,
        "overlap": 1,
        "kernels": 20,
        "decode": pairs,
        "gaps": 2,
        "resident": 1,
    }
    assert json.loads(json.dumps(result)) == result
    assert [bar.met for bar in bars(result)].count(None) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["8x7b-2-2bit"]
    assert not device.races


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_host_has_queued_everything_before_the_measured_work_begins():
    clock, memory = (
        EventClock(torch.cuda.current_device()),
        torch.empty(1 << 20, dtype=torch.uint8, device="cuda"),
    )
    found = median_time(clock, lambda i: memory.zero_(), 100, 3)
    assert found.queued and found.seconds > 0
