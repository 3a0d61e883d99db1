import json
from functools import partial

import pytest
from made_traces import random_experts, trace_of

from converter.cli.options import early_checks
from loader.traces.trace import write_trace


@pytest.fixture
def run(run_command):
    return partial(run_command, "replay")


@pytest.fixture
def traces(tmp_path):
    """Two traces of the same habits."""
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path / f"{seed}.zst")
        guesses = random_experts(seed + 10, 300, layers=2, chosen=4)
        write_trace(paths[-1], trace_of(random_experts(seed, 300, layers=3), guesses=guesses))
    return paths


def test_every_combination_is_replayed(run, traces):
    code, out, err = run(traces[0], "--slots", "2,5", "--disk", 1, "--link", 10, "--json")
    report = json.loads(out)
    assert code == 0
    assert [(r["policy"], r["slots"]) for r in report["runs"]] == [
        (policy, slots) for policy in ("lrfu", "lru", "lfu", "belady") for slots in (2, 5)
    ]
    for found in report["runs"]:
        assert [setting["guesses"] for setting in found["reads"]] == [0, 1, 2]
        none = found["reads"][0]
        # Nothing is guessed: bytes are misses, and a link ten times as fast gives ten times the
        # tokens.
        assert none["total_bytes_per_token"] == pytest.approx(
            1000 * 3 * 2 * (1 - found["hit_ratio"])
        )
        assert none["tokens_per_s"]["disk"] == pytest.approx(1e9 / none["total_bytes_per_token"])
        assert none["tokens_per_s"]["link"] == pytest.approx(10 * none["tokens_per_s"]["disk"])
    assert "lrfu, 2 slots: hit ratio 0." in err


def test_the_tables_have_a_line_for_each_setting(run, traces):
    code, out, _ = run(traces[0], "--policy", "lru", "--slots", 4, "--by-layer", "--disk", 2)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "made: 300 decoded tokens, 0 prompt tokens, 3 layers, 2 of 8 experts"
    assert {"hit ratio, by slots a layer", "recall by guesses, with this norm", "reads"} <= set(
        lines
    )
    assert sum(line.startswith("lru ") for line in lines) == 1 + 3
    assert any(line.startswith("1 → 2 ") for line in lines)
    assert lines[-1].startswith("belady      4        2")


def test_all_slots_but_the_last_are_the_default(run, traces):
    _, out, _ = run(traces[0], "--policy", "lru", "--json", "-q")
    assert [r["slots"] for r in json.loads(out)["runs"]] == [2, 3, 4, 5, 6, 7] * 2


def test_the_fixed_set_and_the_shares_come_from_another_trace(run, traces):
    options = [
        "--policy",
        "fixed,lru",
        "--slots",
        3,
        "--choose-from",
        traces[1],
        "--shares",
        "chosen",
        "--json",
    ]
    code, out, _ = run(traces[0], *options)
    assert code == 0
    fixed, lru, belady = json.loads(out)["runs"]
    for chosen in (fixed, lru):
        assert sum(layer["slots"] for layer in chosen["layers"]) == 9
    assert [layer["slots"] for layer in belady["layers"]] == [3, 3, 3]
    # Independent draws: frequency predicts the next use, recency does not.
    assert fixed["hit_ratio"] > lru["hit_ratio"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "fixed"], "need --choose-from"),
        (["--shares", "chosen"], "need --choose-from"),
        (["--policy", "mru"], "'mru' is unknown; known are lru, lfu, lrfu, fixed"),
        (["--slots", "9"], "this model has 8 experts per layer"),
        (["--slots", "two"], "expected numbers"),
        (["--guesses", "5"], "the trace has 0 to 4"),
        (["--plot", "x.pdf"], "must end in .svg or .png"),
    ],
)
def test_wrong_options_are_usage_errors(run, traces, options, message):
    code, _, err = run(traces[0], *options)
    assert code == 2
    assert message in err


def test_another_models_trace_is_not_chosen_from(run, traces, tmp_path):
    write_trace(tmp_path / "x", trace_of(random_experts(0, 9, layers=2)))
    code, _, err = run(traces[0], "--policy", "fixed", "--choose-from", tmp_path / "x")
    assert code == 2
    assert "not the same model" in err


def test_a_file_that_is_no_trace_is_damage(run, tmp_path):
    (tmp_path / "x").write_text("no")
    code, _, err = run(tmp_path / "x")
    assert code == 3
    assert "not a trace" in err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_drawn(run, traces, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    assert run(traces[0], "--slots", "2,4", "--plot", path)[0] == 0
    begin = path.read_bytes()[:400]
    assert (
        begin.startswith(b"\x89PNG")
        if suffix == "png"
        else b"<svg" in begin or b"<!DOCTYPE svg" in begin
    )


def test_without_matplotlib_the_work_does_not_begin(run, traces, tmp_path, monkeypatch):
    monkeypatch.setattr(early_checks, "find_spec", lambda name: None)
    monkeypatch.setattr("loader.traces.replay_report.replay_trace", lambda *_, **__: 1 / 0)
    code, _, err = run(traces[0], "--slots", "4", "--plot", tmp_path / "x.png")
    assert code == 1
    assert "moe-convert[plots]" in err
    assert not (tmp_path / "x.png").exists()
