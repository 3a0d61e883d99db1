import json
from functools import partial

import pytest

from loader.trace import read_trace


@pytest.fixture
def run(run_command):
    return partial(run_command, "trace")


@pytest.fixture
def english(example_folder):
    return example_folder.parent / "text" / "english.txt"


def test_a_converted_folder_is_traced(run, converted, english, tmp_path):
    out = tmp_path / "t.zst"
    code, said, err = run(converted("2bit"), "--text", english, "--max-tokens", 512, "-o", out, "--json")
    assert code == 0
    assert "english.txt: 2 windows" in err
    result = json.loads(said)
    assert (result["tokens"], result["prompt_tokens"], result["bytes"]) == (512, 0, out.stat().st_size)
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


def test_either_text_or_prompts_must_be_given(run, converted, english, tmp_path):
    for options in ([], ["--text", english, "--prompts", english]):
        code, _, err = run(converted("2bit"), *options, "-o", tmp_path / "t.zst")
        assert code == 2
        assert "either --text or --prompts" in err
    assert not list(tmp_path.iterdir())
