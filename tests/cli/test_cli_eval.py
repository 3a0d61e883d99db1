import json
from functools import partial

import pytest

# examples/tiny-mixtral/README.md: the first 16 windows of 256 of each text, transformers, bf16.
README_16_WINDOWS = {
    "english": 64.868,
    "french": 28.717,
    "german": 55.723,
    "python": 58.53,
    "technical": 69.99,
}


@pytest.fixture
def run(run_command):
    return partial(run_command, "eval")


@pytest.fixture
def texts(example_folder):
    return {name: example_folder.parent / "text" / f"{name}.txt" for name in README_16_WINDOWS}


def test_the_example_has_the_perplexity_of_its_readme(run, example_folder, texts):
    options = [part for text in texts.values() for part in ("--text", text)]
    code, out, _ = run(example_folder, *options, "--max-windows", 16, "--json")
    result = json.loads(out)
    assert code == 0
    found = {text["name"].removesuffix(".txt"): text["perplexity"] for text in result["texts"]}
    assert found == pytest.approx(README_16_WINDOWS, rel=0.005)
    assert result["overall"]["tokens"] == 5 * 16 * 255


def test_four_bits_cost_little(run, converted, example_folder, texts):
    options = ["--text", texts["english"], "--max-windows", 4, "--json"]
    before = json.loads(run(example_folder, *options)[1])["overall"]["perplexity"]
    after = json.loads(run(converted("4bit"), *options, "--kernels", "torch")[1])["overall"][
        "perplexity"
    ]
    assert after / before == pytest.approx(1, abs=0.03)


def test_a_kv_cache_of_8_bits_changes_the_perplexity_a_little(run, converted, texts):
    options = ["--text", texts["english"], "--max-windows", 2, "--json"]
    wide, narrow = (
        json.loads(run(converted("4bit"), *options, "--kv-bits", bits)[1])["overall"]["perplexity"]
        for bits in (16, 8)
    )
    assert wide != narrow
    assert narrow / wide == pytest.approx(1, abs=0.01)


def test_a_kv_cache_of_8_bits_needs_a_converted_folder(run, example_folder, texts):
    code, _, err = run(example_folder, "--text", texts["english"], "--kv-bits", 8)
    assert code == 2
    assert "--kv-bits 8" in err and "not a converted folder" in err


def test_the_table_has_each_text_and_overall(run, converted, texts):
    options = [
        "--text",
        texts["english"],
        "--text",
        texts["german"],
        "--max-windows",
        1,
        "--window",
        64,
    ]
    code, out, err = run(converted("2bit"), *options, "--kernels", "torch")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "text",
        "english.txt",
        "german.txt",
        "overall",
    ]
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["63", "63", "126"]
    assert "1 windows" in err


def test_a_text_is_needed_and_must_exist(run, example_folder, tmp_path):
    assert run(example_folder)[0] == 2
    assert run(example_folder, "--text", tmp_path / "none.txt")[0] == 2


def test_pickles_are_not_read(run, tmp_path, texts, example_folder):
    (tmp_path / "config.json").write_bytes((example_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, _, err = run(tmp_path, "--text", texts["english"])
    assert code == 1
    assert "pickles are never read" in err


def test_code_in_a_checkpoint_is_not_run(run, tmp_path, texts, example_folder):
    for file in example_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code, _, err = run(tmp_path, "--text", texts["english"])
    assert code == 1
    assert "error:" in err
    assert not (tmp_path / "ran").exists()
