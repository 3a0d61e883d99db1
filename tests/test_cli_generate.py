import io
import json

import pytest

import loader
from converter.cli.main import main
from formats.artifact import Artifact
from loader.budget import aside_bytes

PROMPT = "So Jonah arose, and went to Nineveh, according to"


@pytest.fixture
def run(converted, capsys):
    """Runs `generate` on the converted example; gives exit code, stdout, stderr."""

    def run(*arguments, path=None):
        with pytest.raises(SystemExit) as exit_:
            main(
                ["generate", str(path or converted("2bit")), "--kernels", "torch", "--max-new-tokens", "6", *arguments]
            )
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def expected(converted):
    """What the model itself gives, greedily."""
    model = loader.from_pretrained(converted("2bit"), kernels="torch")
    tokenizer = loader.load_tokenizer(converted("2bit"))
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
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


def test_stats_go_to_stderr(run, expected):
    _, out, err = run("--prompt", PROMPT, "--stats")
    assert out == expected + "\n"
    assert "hit ratio" in err
    assert "tokens/s" in err


def test_a_small_cache_gives_the_same_text(run, expected, converted):
    least = least_bytes(Artifact.open(converted("2bit")))
    for reading in ("mmap", "direct"):
        assert run("--prompt", PROMPT, "--ram-cache", str(least), "--io", reading)[1] == expected + "\n"


def test_too_small_a_cache_exits_4_and_names_the_least(run, converted):
    least = least_bytes(Artifact.open(converted("2bit")))
    code, out, err = run("--prompt", PROMPT, "--ram-cache", "100kB")
    assert code == 4
    assert out == ""
    assert str(least) in err


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
    return aside_bytes(artifact, 2)
