import json
from functools import partial

import pytest
from make_checkpoint import SHAPES, make_checkpoint

from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from loader.traces.trace import read_trace


@pytest.fixture
def run(run_command):
    return partial(run_command, "trace")


@pytest.fixture
def english(example_folder):
    return example_folder.parent / "text" / "english.txt"


def test_a_converted_folder_is_traced(run, converted, english, tmp_path):
    out = tmp_path / "t.zst"
    code, said, err = run(
        converted("2bit"), "--text", english, "--max-tokens", 512, "-o", out, "--json"
    )
    assert code == 0
    assert "english.txt: 2 of 2 windows" in err
    result = json.loads(said)
    assert (result["tokens"], result["prompt_tokens"], result["bytes"]) == (
        512,
        0,
        out.stat().st_size,
    )
    header = read_trace(out).header
    assert header.model == "2bit"
    assert header.producer.startswith("moe-convert ")


def test_prompts_of_an_ordinary_checkpoint_are_traced(run, example_folder, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\ntwo\n")
    out = tmp_path / "t.zst"
    code, said, _ = run(example_folder, "--prompts", prompts, "--max-new-tokens", 3, "-o", out)
    assert code == 0
    assert " tokens in 2 sequences" in said
    assert all(s.tokens == s.prompt_tokens + 2 for s in read_trace(out).header.sequences)


def test_a_prompt_is_the_users_message_of_the_tokenizers_template(run, templated, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "t.zst"
    lengths = {}
    for line, options in (("So", []), ("So", ["--raw"]), ("<s>[user] So", ["--raw"])):
        prompts.write_text(line)
        options = [*options, "--check", "none", "--max-new-tokens", 2]
        assert run(templated, "--prompts", prompts, *options, "-o", out)[0] == 0
        lengths[line, len(options)] = read_trace(out).header.sequences[0].prompt_tokens
    plain, written, templated_line = lengths["So", 5], lengths["<s>[user] So", 5], lengths["So", 4]
    # The template ends a message with a line feed.
    assert plain < written < templated_line == written + 1


def test_raw_needs_prompts(run, converted, english, tmp_path):
    code, _, err = run(converted("2bit"), "--text", english, "--raw", "-o", tmp_path / "t.zst")
    assert code == 2
    assert "--raw needs --prompts" in err


def test_either_text_or_prompts_must_be_given(run, converted, english, tmp_path):
    for options in ([], ["--text", english, "--prompts", english]):
        code, _, err = run(converted("2bit"), *options, "-o", tmp_path / "t.zst")
        assert code == 2
        assert "either --text or --prompts" in err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A converted model of one layer."""
    root = tmp_path_factory.mktemp("one")
    make_checkpoint(root / "source", SHAPES["mini"], 1)
    convert_checkpoint(root / "source", root / "out", make_recipe("4bit", solver="hqq"))
    return root / "out"


def test_a_model_of_one_layer_is_traced_without_guesses_and_replayed(
    run, run_command, one_layer, english, tmp_path
):
    out = tmp_path / "t.zst"
    code, said, _ = run(
        one_layer, "--text", english, "--window", 64, "--max-tokens", 576, "-o", out, "--json"
    )
    assert code == 0
    assert json.loads(said)["tokens"] == 576
    trace = read_trace(out)
    assert trace.experts.shape == (576, 1, 2)
    assert trace.guesses.shape == trace.guesses_next_norm.shape == (576, 0, 4)
    code, said, _ = run_command(
        "replay", out, "--slots", "2,3", "--guesses", "0,1", "--by-layer", "--json"
    )
    assert code == 0
    report = json.loads(said)
    assert report["recall"]["next_norm"] == []
    assert all(reads["useful_bytes_per_token"] == 0 for r in report["runs"] for reads in r["reads"])
    assert run_command("replay", out, "--disk", 2, "--by-layer")[0] == 0


def test_prompts_of_a_model_of_one_layer_are_traced_and_choose_its_slots(
    run, run_command, one_layer, tmp_path
):
    prompts, out = tmp_path / "p.txt", tmp_path / "t.zst"
    prompts.write_text("one\ntwo three\n")
    assert run(one_layer, "--prompts", prompts, "--max-new-tokens", 3, "-o", out)[0] == 0
    assert len(read_trace(out).header.sequences) == 2
    code, _, err = run_command(
        "generate",
        one_layer,
        "--prompt",
        "one",
        "--max-new-tokens",
        4,
        "--ram-cache",
        "128KiB",
        "--trace",
        out,
    )
    assert code == 0, err


def test_a_model_of_one_layer_is_evaluated(run_command, one_layer, english):
    code, _, err = run_command(
        "eval", one_layer, "--text", english, "--window", 64, "--max-windows", 2
    )
    assert code == 0, err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot_shows_each_layer_and_expert(run, converted, english, tmp_path, suffix):
    image = pytest.importorskip("matplotlib.image")
    options = [converted("2bit"), "--text", english, "--max-tokens", 256]
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        code, _, err = run(*options, "-o", tmp_path / f"{path.stem}.zst", "--plot", path)
        assert code == 0, err
    assert paths[0].read_bytes() == paths[1].read_bytes()
    if suffix == "png":
        height, width, _ = image.imread(paths[0]).shape
        assert width > height > 300


@pytest.mark.parametrize("name", ["x.pdf", "t.zst"])
def test_a_plot_that_cannot_be_written_fails_before_the_model_loads(
    run, converted, english, tmp_path, name, monkeypatch
):
    monkeypatch.setattr("loader.from_pretrained", lambda *_, **__: 1 / 0)
    options = ["--text", english, "-o", tmp_path / "t.zst", "--plot", tmp_path / name]
    assert run(converted("2bit"), *options)[0] == 2
