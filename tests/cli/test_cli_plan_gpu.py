import json
import re
from functools import partial

import pytest
import torch
from made_traces import random_experts, trace_of
from msgspec.structs import replace

from formats.artifact import Artifact
from formats.errors import DoesNotFitError
from loader.budget.expert_sizes import staging_experts
from loader.budget.slot_counts import slots_by_layer, tier_counts
from loader.cuda.experts.stack import TIER_STAGING
from loader.planning import trial_run
from loader.planning.trial_run import TrialRun
from loader.traces.record_trace import TracedModel
from loader.traces.trace import Trace, write_trace

GPU = ("--link", "12", "--gpu-bandwidth", "300")
SMALL = ("--ctx", "64", "--prompt", "8")
VRAM = ("--vram", "560MiB")
SOME = ("--ram", "837MiB", "--disk", "2")
"""RAM that holds not all experts of the example."""


@pytest.fixture
def run(run_command):
    return partial(run_command, "plan")


@pytest.fixture
def planned(run):
    """The one plan as JSON."""

    def planned(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        (plan,) = json.loads(out)["plans"]
        return plan

    return planned


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_parts_of_gpu_memory_and_of_ram_add_up(planned, converted):
    plan = planned(converted("2bit"), *VRAM, *SOME, *GPU, *SMALL)
    assert (plan["gpu"]["vram_bytes"], plan["ram_bytes"]) == (560 << 20, 837 << 20)
    parts = ("trunk_bytes", "kv_bytes", "workspace_bytes", "cache_bytes")
    assert sum(plan["gpu"][name] for name in parts) == plan["gpu"]["vram_bytes"]
    assert sum(plan[name] for name in parts) == plan["ram_bytes"]


def test_the_caches_that_are_named_give_the_slots_that_are_shown(run, planned, converted):
    arguments = converted("2bit"), *VRAM, *SOME, *GPU, *SMALL
    plan, text = planned(*arguments), run(*arguments)[1]
    artifact = Artifact.open(converted("2bit"))
    gpu_cache, ram_cache = map(
        int, re.search(r"--gpu-cache (\d+) --ram-cache (\d+)", text).groups()
    )
    staging = staging_experts(artifact.architecture)
    assert slots_by_layer(gpu_cache, artifact, staging, all_in_place=False) == tuple(
        plan["gpu"]["slots"]
    )
    assert sum(tier_counts(ram_cache, artifact, TIER_STAGING).values()) == sum(plan["slots"])


def test_without_ram_all_experts_are_in_ram_and_what_that_takes_is_said(run, planned, converted):
    arguments = converted("2bit"), *VRAM, *GPU, *SMALL
    plan = planned(*arguments)
    assert plan["slots"] == [8] * 8
    assert plan["read_bytes_per_token"] == 0
    _, out, _ = run(*arguments)
    assert f"which takes {plan['ram_bytes'] / 1e6:.1f} MB" in out
    assert "measured on no GPU" in out


def test_more_gpu_memory_is_never_slower(planned, converted):
    least = planned(converted("2bit"), *VRAM, *GPU, *SMALL)["gpu"]
    fixed = least["vram_bytes"] - least["cache_bytes"] + least["aside_bytes"]
    budgets = [fixed + n * least["slot_bytes"] // 7 for n in range(8)]
    plans = [planned(converted("2bit"), "--vram", budget, *GPU, *SMALL) for budget in budgets]
    speeds = [plan["tokens_per_s"] for plan in plans]
    assert speeds == sorted(speeds)
    assert [min(plan["gpu"]["slots"]) for plan in plans] == [0, 1, 2, 3, 4, 5, 6, 8]
    assert speeds[0] < speeds[-1]


def test_a_plan_without_gpu_memory_has_no_gpu_part(planned, converted):
    assert "gpu" not in planned(
        converted("2bit"), "--ram", "400MB", "--disk", "2", "--memory", "20"
    )


def test_without_a_gpu_speeds_must_be_said_and_typical_ones_are_named(run, converted):
    code, _, err = run(converted("2bit"), *VRAM)
    assert code == 2
    assert "give --link GB/s and --gpu-bandwidth GB/s" in err
    assert "PCIe 3 x16" in err and "RTX 3060" in err
    code, _, err = run(converted("2bit"), *VRAM, "--link", "12")
    assert code == 2
    assert "give --gpu-bandwidth GB/s;" in err


def test_with_a_gpu_what_is_not_said_is_measured(run, converted, monkeypatch):
    from recording_device import RecordingDevice

    from loader.cuda.device import speeds, torch_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch_device, "cuda_devices", lambda names: [RecordingDevice(name=name) for name in names]
    )
    monkeypatch.setattr(speeds, "memory_bytes_per_s", lambda device: 5e9)
    measured = []
    monkeypatch.setattr(
        speeds, "link_bytes_per_s", lambda device, block: measured.append(block) or 7e9
    )
    found = json.loads(run(converted("2bit"), *VRAM, *SMALL, "--json")[1])
    assert (found["link_bytes_per_s"], found["gpu_memory_bytes_per_s"]) == (7e9, 5e9)
    assert measured == [Artifact.open(converted("2bit")).layout(0, 0).n_bytes]
    found = json.loads(run(converted("2bit"), *VRAM, *SMALL, "--link", "3", "--json")[1])
    assert (found["link_bytes_per_s"], found["gpu_memory_bytes_per_s"]) == (3e9, 5e9)
    assert len(measured) == 1


@pytest.mark.parametrize(
    "arguments",
    [("--link", "12"), ("--gpu-bandwidth", "300"), ("--memory", "20", *VRAM)],
    ids=lambda words: words[0],
)
def test_speeds_that_the_plan_does_not_use_are_refused(run, converted, arguments):
    code, _, err = run(converted("2bit"), *arguments)
    assert code == 2
    assert f"Error: {arguments[0]} " in err


def test_the_disk_is_needed_only_where_ram_may_not_hold_all(run, example_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((example_folder / "config.json").read_bytes())
    assert run(tmp_path, *VRAM, *GPU, *SMALL)[0] == 0
    code, _, err = run(tmp_path, *VRAM, *GPU, *SMALL, *SOME[:2])
    assert code == 2
    assert "--disk" in err


@pytest.mark.parametrize(
    "short", [["--vram", "100MB"], [*VRAM, "--ram", "100MB", "--disk", "2"]], ids=["GPU", "RAM"]
)
def test_where_nothing_fits_the_exit_code_is_4_and_the_least_is_named(run, converted, short):
    code, out, err = run(converted("2bit"), *short, *GPU, *SMALL)
    assert (code, out) == (DoesNotFitError.exit_code, "")
    least = err.split("at least ")[1].split(",")[0]
    enough = [least if word == "100MB" else word for word in short]
    assert run(converted("2bit"), *enough, *GPU, *SMALL)[0] == 0


def test_a_trace_gives_the_misses_of_both(planned, converted, tmp_path):
    described = TracedModel.of_folder(converted("2bit"))
    made = trace_of(random_experts(3, 200, layers=8, skew=4), expert_bytes=described.expert_bytes)
    header = replace(made.header, architecture=described.architecture)
    write_trace(
        tmp_path / "x.zst",
        Trace(header, made.experts, made.weights, made.guesses, made.guesses_next_norm),
    )
    all_there = planned(converted("2bit"), *VRAM, *GPU, *SMALL)["gpu"]
    half = (
        all_there["vram_bytes"]
        - all_there["cache_bytes"]
        + all_there["aside_bytes"]
        + all_there["slot_bytes"] // 2
    )
    arguments = converted("2bit"), "--vram", half, *SOME, *GPU, *SMALL
    uniform, traced = planned(*arguments), planned(*arguments, "--trace", tmp_path / "x.zst")
    assert 4 <= min(uniform["slots"]) < 8
    assert set(uniform["gpu"]["slots"]) == {4}
    assert traced["gpu"]["miss_ratio"] < uniform["gpu"]["miss_ratio"] / 2
    assert 0 < traced["miss_ratio"] < uniform["miss_ratio"]


def test_verifying_needs_a_gpu(run, converted):
    code, _, err = run(converted("2bit"), *VRAM, *GPU, *SMALL, "--verify")
    assert code == 2
    assert "needs a GPU" in err


def test_verifying_runs_with_the_planned_caches(run, planned, converted, monkeypatch):
    tried = []

    def loaded(folder, prompt, tokens, options):
        tried.append(options)
        return TrialRun(tokens, tokens_per_s=3.25, hit_ratio=0.75, read_bytes_per_token=0)

    monkeypatch.setattr(trial_run, "_decode", loaded)
    monkeypatch.setattr("converter.cli.commands.plan_command.has_gpu", lambda: True)
    _, out, _ = run(converted("2bit"), *VRAM, *GPU, *SMALL, "--verify")
    plan = planned(converted("2bit"), *VRAM, *GPU, *SMALL)
    assert tried == [
        {
            "device": "cuda",
            "gpu_cache": plan["gpu"]["cache_bytes"],
            "ram_cache": plan["cache_bytes"],
            "policy": "lrfu",
            "check": "fast",
            "kv_bits": 16,
        }
    ]
    assert "measured: misses 0.250 on the GPU, 3.25 tokens/s" in out
