import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_traces import random_experts, trace_of
from msgspec.structs import replace

import loader
from converter.cli.show.generation_stats import live_line, stats_table
from converter.cli.show.live_text import LiveText
from formats.artifact import Artifact
from loader.budget.expert_sizes import expert_bytes_by_layer, staging_bytes
from loader.experts.stats import LayerStats
from loader.traces.trace import Trace, write_trace

PROMPT = "So Jonah arose, and went to Nineveh, according to"


@pytest.fixture
def run(converted, run_command):
    """Runs `generate` on the converted example; gives exit code, stdout, stderr."""

    def run(*arguments, path=None):
        folder = path or converted("2bit")
        return run_command(
            "generate", folder, "--kernels", "torch", "--max-new-tokens", "6", *arguments
        )

    return run


@pytest.fixture(scope="module")
def expected(converted):
    """The text of the model's own greedy generate."""
    model = loader.from_pretrained(converted("2bit"), kernels="torch")
    tokenizer = loader.load_tokenizer(converted("2bit"))
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_greedy_text_streams_to_stdout_alone(run, expected):
    code, out, _ = run("--prompt", PROMPT)
    assert code == 0
    assert out == expected + "\n"


def test_the_prompt_can_come_from_stdin(run, expected, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run("--prompt", "-")[1] == expected + "\n"


def test_json_has_text_and_counters(run, expected):
    code, out, _ = run("--prompt", PROMPT, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["text"] == expected
    assert result["new_tokens"] == 6
    assert result["cache"]["hits"] + result["cache"]["misses"] > 0
    assert result["tokens_per_s"] > 0


def test_json_has_the_tokens_and_why_they_end(run, expected, converted):
    result = json.loads(run("--prompt", PROMPT, "--json")[1])
    tokenizer = loader.load_tokenizer(converted("2bit"))
    assert len(result["token_ids"]) == 6
    assert tokenizer.decode(result["token_ids"]) == expected
    assert result["finish_reason"] == "length"


def test_the_prompt_is_the_users_message_of_the_tokenizers_template(run, templated, expected):
    chat, raw = (
        json.loads(
            run("--prompt", PROMPT, "--check", "none", "--json", *options, path=templated)[1]
        )
        for options in ([], ["--raw"])
    )
    as_text = json.loads(run("--prompt", f"<s>[user] {PROMPT}\n", "--json")[1])
    assert raw["text"] == expected
    assert chat["token_ids"] == as_text["token_ids"] != raw["token_ids"]
    # [user] and the line feed, and one BOS.
    assert chat["prompt_tokens"] == as_text["prompt_tokens"] > raw["prompt_tokens"]


def test_a_template_that_refuses_is_an_error_before_the_weights(run, templated, monkeypatch):
    config = templated / "tokenizer_config.json"
    config.write_text(
        config.read_text().replace("{{ bos_token }}", "{{ raise_exception('not today') }}")
    )
    (templated / "trunk.safetensors").unlink()
    code, out, err = run("--prompt", PROMPT, "--check", "none", path=templated)
    assert (code, out) == (1, "")
    assert "the chat template fails: TemplateError: not today" in err


def test_sampling_options_reach_the_sampling(run, expected):
    certain = run("--prompt", PROMPT, "--temperature", "2", "--top-k", "1", "--seed", "1")[1]
    assert certain == expected + "\n"
    certain = run("--prompt", PROMPT, "--temperature", "2", "--min-p", "1", "--seed", "1")[1]
    assert certain == expected + "\n"
    assert run("--prompt", PROMPT, "--repetition-penalty", "50")[1] != expected + "\n"


def test_stats_go_to_stderr(run, expected):
    _, out, err = run("--prompt", PROMPT, "--stats")
    assert out == expected + "\n"
    assert "hit ratio" in err
    assert "tokens/s" in err


def test_a_kv_cache_of_8_bits_shows_in_the_stats(run, expected):
    _, out, err = run("--prompt", PROMPT, "--stats", "--kv-bits", "8", "--device", "cpu")
    assert out.strip()
    assert "KV cache: 8 bits" in err
    assert "KV cache: 8 bits" not in run("--prompt", PROMPT, "--stats")[2]


def test_stats_show_guesses_waits_and_what_was_wasted(run, converted):
    budget = str(4 * least_bytes(Artifact.open(converted("2bit"))))
    _, out, err = run("--prompt", PROMPT, "--ram-cache", budget, "--stats", "--json")
    cache = json.loads(out)["cache"]
    assert cache["guesses"] > 0
    assert 0 < cache["wait_share"] < 1 and 0 < cache["busy_share"] < 1
    assert {"recall", "useful", "wasted"} <= set(err.splitlines()[0].split())
    total = next(line for line in err.splitlines() if line.startswith("all ")).split()
    assert total[1:4] == [f"{cache['slots']:g}", str(cache["hits"]), str(cache["misses"])]
    assert "waited for reads" in err and "the disk was busy" in err
    for options in (["--no-prefetch"], ["--prefetch", "0"], ["--prefetch", "2", "--no-prefetch"]):
        out = run("--prompt", PROMPT, "--ram-cache", budget, "--json", *options)[1]
        assert json.loads(out)["cache"]["guesses"] == 0


class Terminal:
    """A terminal that stdout and stderr write to."""

    def __init__(self, columns, lines, monkeypatch):
        pyte = pytest.importorskip("pyte")
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
        stream = pyte.Stream(self.screen)
        # The kernel's terminal returns the carriage at each line feed.
        self.feed = lambda text: stream.feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))
        shown = SimpleNamespace(isatty=lambda: True, write=self.feed, flush=lambda: None)
        monkeypatch.setattr("sys.stdout", shown)
        monkeypatch.setattr("sys.stderr", shown)
        monkeypatch.setattr(
            "shutil.get_terminal_size", lambda *_, **__: os.terminal_size((columns, lines))
        )

    def text(self):
        """Return all text on the terminal, with the lines that scrolled out."""
        above = [
            "".join(row[x].data for x in range(self.screen.columns))
            for row in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()


def test_the_live_line_stays_below_the_text_and_goes_at_the_end(monkeypatch):
    terminal = Terminal(30, 4, monkeypatch)
    screen = terminal.screen
    total = LayerStats(hits=3, misses=1, bytes_read=2_000_000)
    model = SimpleNamespace(moe_stats=lambda: SimpleNamespace(total=total))
    answer = SimpleNamespace(new_tokens=0, tokens_per_s=None)
    text = LiveText(lambda: live_line(answer, model))
    for number, piece in enumerate(
        ["one ", "two ", "of a line that is longer than ", "it is wide\n", "\nend"], 1
    ):
        answer.new_tokens = number
        text(piece)
        assert screen.display[screen.cursor.y + 1].startswith(f"{number} tokens, ")
        assert sum("tokens, " in line for line in screen.display) == 1
    text.end()
    assert [line.rstrip() for line in screen.display] == ["er than it is wide", "", "end", ""]


PIECES = [
    ["x" * 79, "y", "z" * 80, "one\n", "two"],
    [
        letter
        for letter in "Of lines that are longer than the terminal is wide, letter by letter. " * 9
    ],
    ["漢字" * 45, "x", "🙂👩‍👩‍👧 " * 30, "e\u0301" * 100, "\n", "a\tb\t" * 30, "end"],
    ["line\n" * 40, "\n", " " * 80, "."],
]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("pieces", PIECES, ids=["edges", "letters", "wide", "scrolled"])
def test_the_live_line_changes_no_character_of_the_text(monkeypatch, columns, pieces):
    plain, live = (Terminal(columns, 24, monkeypatch) for _ in range(2))
    drawn = []

    def status():
        drawn.append(len(drawn))
        return f"{len(drawn)} tokens, " + "-" * 200

    text = LiveText(status)
    for piece in pieces:
        text(piece)
        plain.feed(piece)
        rows = live.text().splitlines()
        assert "\n".join(row for row in rows if " tokens, --" not in row).rstrip() == plain.text()
    text.end()
    assert live.text() == plain.text()
    assert drawn


def test_a_resize_draws_no_line_before_the_next_one_begins(monkeypatch):
    Terminal(80, 24, monkeypatch)
    drawn = []
    text = LiveText(lambda: drawn.append(1) or "line")
    text("begun ")
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((40, 24)))
    text("and resized")
    assert len(drawn) == 1
    text("\n")
    text("next")
    assert len(drawn) == 3


def test_a_pipe_gets_no_live_line(run):
    assert "\x1b" not in run("--prompt", PROMPT, "--stats")[2]


@pytest.mark.parametrize(
    "options", [["--policy", "lru"], ["--check", "sha256"], ["--prefetch", "1"]]
)
def test_cache_options_change_no_token(run, expected, converted, options):
    budget = str(4 * least_bytes(Artifact.open(converted("2bit"))))
    assert run("--prompt", PROMPT, "--ram-cache", budget, *options)[1] == expected + "\n"


def test_a_trace_divides_the_slots(run, expected, converted, tmp_path):
    artifact = Artifact.open(converted("2bit"))
    skew = np.arange(8)[:, None]
    trace = trace_of(
        random_experts(1, 300, layers=8, skew=skew), expert_bytes=expert_bytes_by_layer(artifact)
    )
    header = replace(trace.header, architecture=artifact.architecture)
    write_trace(
        tmp_path / "x",
        Trace(header, trace.experts, trace.weights, trace.guesses, trace.guesses_next_norm),
    )
    budget = str(least_bytes(artifact) + 4 * sum(expert_bytes_by_layer(artifact)))
    _, out, _ = run("--prompt", PROMPT, "--ram-cache", budget, "--trace", tmp_path / "x", "--json")
    result = json.loads(out)
    slots = [layer["slots"] for layer in result["cache"]["layers"]]
    assert result["text"] == expected
    assert sum(slots) == 32 and slots[0] > 4 > slots[-1]


def test_a_trace_of_another_model_divides_nothing(run, tmp_path):
    write_trace(tmp_path / "x", trace_of(random_experts(1, 9, layers=2)))
    code, _, err = run("--prompt", PROMPT, "--trace", tmp_path / "x")
    assert code == 2
    assert "another model" in err


def test_a_small_cache_gives_the_same_text(run, expected, converted):
    least = least_bytes(Artifact.open(converted("2bit")))
    for reading in ("mmap", "direct"):
        assert (
            run("--prompt", PROMPT, "--ram-cache", str(least), "--io", reading)[1]
            == expected + "\n"
        )


def test_too_small_a_cache_exits_4_and_names_the_least(run, converted):
    least = least_bytes(Artifact.open(converted("2bit")))
    code, out, err = run("--prompt", PROMPT, "--ram-cache", "100kB")
    assert code == 4
    assert out == ""
    assert str(least) in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_with_the_next_step(run):
    code, out, err = run("--prompt", PROMPT, "--device", "cuda")
    assert (code, out) == (1, "")
    assert "use device='cpu', or install torch for CUDA" in err


def test_stats_of_a_gpu_say_what_its_ram_did(run):
    _, out, _ = run("--prompt", PROMPT, "--json")
    result = json.loads(out)
    result["cache"] |= {
        "cpu_experts": 3,
        "ram": {
            "buffer_bytes": 10**9,
            "hits": 5,
            "misses": 2,
            "evictions": 0,
            "bytes_read": 4 * 10**8,
        },
    }
    assert (
        "3 experts computed on the CPU; RAM cache of 1.0 GB: 5 hits, 2 misses,"
        " 400.0 MB from the disk"
    ) in stats_table(result)


def test_a_seed_gives_the_same_sample_again(run):
    sample = ["--prompt", PROMPT, "--temperature", "1.5", "--top-p", "0.95"]
    one, again, other = (run(*sample, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert one == again
    assert one != other


def test_one_token_has_no_rate(run):
    _, out, _ = run("--prompt", PROMPT, "--json", "--max-new-tokens", "1")
    assert json.loads(out)["tokens_per_s"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "--prompt"),
        (["--prompt", "x", "--ram-cache", "lots"], 2, "lots"),
        (["--prompt", "x", "--io", "tape"], 2, "tape"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature"),
    ],
)
def test_wrong_options_are_usage_errors(run, arguments, code, part):
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert part in err


def test_an_ordinary_checkpoint_is_refused_with_the_next_step(run, example_folder):
    code, _, err = run("--prompt", "x", path=example_folder)
    assert code != 0
    assert "moe_index.json" in err


def least_bytes(artifact):
    return staging_bytes(artifact, 2)
