import json
import shutil
from functools import partial

import pytest
from made_traces import random_experts, trace_of

from formats.artifact import Artifact
from loader.budget.slot_counts import slots_of_folder
from loader.traces.record_trace import TracedModel

SPEEDS = ("--disk", "2", "--memory", "20")
SMALL = ("--ctx", "64", "--prompt", "8")


@pytest.fixture
def run(run_command):
    return partial(run_command, "plan")


def test_without_a_budget_several_are_compared(run, converted):
    code, out, _ = run(converted("2bit"), *SPEEDS)
    assert code == 0
    rows = out.split("\n\n")[1].splitlines()
    assert len(rows) == 1 + 5
    code, out, _ = run(converted("2bit"), *SPEEDS, "--json")
    plans = json.loads(out)["plans"]
    assert [min(plan["slots"]) for plan in plans] == [0, 1, 3, 5, 8]
    speeds = [plan["tokens_per_s"][0] for plan in plans]
    assert speeds == sorted(speeds)


def test_a_budget_shows_its_parts_which_add_up(run, converted):
    code, out, _ = run(converted("2bit"), "--ram", "400MB", *SPEEDS, *SMALL, "--json")
    plan = json.loads(out)["plans"][0]
    assert code == 0
    assert plan["ram_bytes"] == 400 * 10**6
    parts = ("trunk_bytes", "kv_bytes", "workspace_bytes", "cache_bytes")
    assert sum(plan[name] for name in parts) == plan["ram_bytes"]
    _, out, _ = run(converted("2bit"), "--ram", "400MB", *SPEEDS, *SMALL)
    assert f"--ram-cache {plan['cache_bytes']}" in out
    assert "8 of 8 in each layer" in out


def test_the_cache_that_is_named_gives_the_slots_that_are_shown(run, converted):
    _, out, _ = run(converted("2bit"), *SPEEDS, "--json")
    artifact = Artifact.open(converted("2bit"))
    for plan in json.loads(out)["plans"]:
        assert slots_of_folder(artifact, plan["cache_bytes"], "auto") == tuple(plan["slots"])


def test_where_nothing_fits_the_exit_code_is_4_and_the_least_is_named(run, converted):
    code, out, err = run(converted("2bit"), "--ram", "100MB", *SPEEDS)
    assert (code, out) == (4, "")
    least = err.split("at least ")[1].split(",")[0]
    assert run(converted("2bit"), "--ram", least, *SPEEDS)[0] == 0


def test_the_disk_is_measured_where_nothing_is_said(run, converted):
    code, out, _ = run(converted("2bit"), "--memory", "20", "--json")
    assert code == 0
    assert json.loads(out)["disk_bytes_per_s"] > 0


def test_a_trace_gives_the_misses(run, converted, tmp_path, write):
    described = TracedModel.of_folder(converted("2bit"))
    trace = trace_of(random_experts(3, 200, layers=8, skew=4), expert_bytes=described.expert_bytes)
    write(tmp_path / "x.zst", trace, described.architecture)
    _, out, _ = run(converted("2bit"), *SPEEDS, "--json")
    _, traced, _ = run(converted("2bit"), *SPEEDS, "--json", "--trace", tmp_path / "x.zst")
    uniform, found = (json.loads(text)["plans"][2]["miss_ratio"] for text in (out, traced))
    assert found < uniform / 2
    write(tmp_path / "y.zst", trace, None)
    code, _, err = run(converted("2bit"), *SPEEDS, "--trace", tmp_path / "y.zst")
    assert code == 1
    assert "another model" in err


@pytest.fixture
def write():
    """Writes a trace as one of a model with a given architecture."""
    from msgspec.structs import replace

    from loader.traces.trace import Trace, write_trace

    def write(path, trace, architecture):
        header = replace(trace.header, architecture=architecture) if architecture else trace.header
        write_trace(
            path,
            Trace(header, trace.experts, trace.weights, trace.guesses, trace.guesses_next_norm),
        )

    return write


def test_a_checkpoint_or_its_config_alone_is_planned_by_a_recipe(
    run, example_folder, converted, tmp_path
):
    shutil.copy(example_folder / "config.json", tmp_path)
    expected = json.loads(run(converted("3bit"), *SPEEDS, "--json")[1])
    for path in (example_folder, tmp_path / "config.json", tmp_path):
        found = json.loads(run(path, "--recipe", "3bit", *SPEEDS, "--json")[1])
        assert found["plans"] == expected["plans"]
    code, _, err = run(tmp_path / "config.json", "--memory", "20")
    assert code == 2
    assert "--disk" in err


def test_a_repository_is_planned_from_what_little_is_fetched(run, hub, converted, example_folder):
    hub.add("me/converted", converted("2bit"))
    hub.add("me/original", example_folder)
    expected = json.loads(run(converted("2bit"), *SPEEDS, "--json")[1])["plans"]
    for name in ("me/converted", "me/original"):
        assert json.loads(run(name, *SPEEDS, "--json")[1])["plans"] == expected
    for name, folder in (("me/converted", converted("2bit")), ("me/original", example_folder)):
        assert (
            hub.served(name)
            < sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 4
        )
    code, _, err = run("me/converted", "--memory", "20")
    assert code == 2
    assert "--disk" in err


def test_verify_compares_with_what_was_measured(run, converted):
    code, out, _ = run(converted("2bit"), "--ram", "345MiB", *SPEEDS, *SMALL, "--verify")
    assert code == 0
    assert "expected: " in out and "measured: " in out
    code, out, _ = run(converted("2bit"), "--ram", "345MiB", *SPEEDS, *SMALL, "--verify", "--json")
    verified = json.loads(out)["plans"][0]["verified"]
    assert verified["tokens"] == 32
    assert verified["tokens_per_s"] > 0


def test_what_is_not_converted_cannot_be_verified(run, example_folder):
    code, _, err = run(example_folder, *SPEEDS, "--verify")
    assert code == 2
    assert "not a converted folder" in err


def test_a_kv_cache_of_8_bits_is_planned_with_its_scales(run, converted):
    options = (*SPEEDS, *SMALL, "--ram", "400MB")
    wide, narrow = (
        json.loads(run(converted("2bit"), *options, "--kv-bits", bits, "--json")[1])["plans"][0]
        for bits in (16, 8)
    )
    # Heads of 32 values in bfloat16: 64 bytes become 32 and a scale of 2.
    assert narrow["kv_bytes"] == wide["kv_bytes"] * 34 // 64
    # While a prompt is computed, one of the 8 layers is dequantized.
    assert narrow["workspace_bytes"] == wide["workspace_bytes"] + wide["kv_bytes"] // 8
    assert "KV cache, 8 bits" in run(converted("2bit"), *options, "--kv-bits", "8")[1]


def test_a_kv_cache_of_8_bits_is_refused_on_a_gpu(run, converted):
    code, _, err = run(converted("2bit"), "--vram", "1GB", "--kv-bits", "8", *SPEEDS)
    assert code == 2
    assert "--kv-bits 8 does not apply to --vram" in err
