import hashlib

import pytest
from measured_texts import trace_prompts, trace_texts

import loader
from formats.artifact import Artifact
from formats.errors import MoeConvertError
from loader.evaluation.perplexity import read_text, windows_of
from loader.hf.loading.plain_checkpoint import load_checkpoint
from loader.model import load_tokenizer
from loader.traces.record_trace import TracedModel
from loader.traces.trace import TracedSequence, TracedText


@pytest.fixture(scope="module")
def model(example_folder):
    return load_checkpoint(example_folder)


@pytest.fixture(scope="module")
def tokenizer(example_folder):
    return load_tokenizer(example_folder)


def test_a_converted_folder_has_the_bytes_of_its_index(converted):
    folder = converted("2bit")
    described, artifact = TracedModel.of_folder(folder), Artifact.open(folder)
    assert described.expert_bytes == (artifact.entry(0, 0).length,) * 8
    assert described.architecture == artifact.architecture
    assert described.name == "2bit"


def test_an_ordinary_checkpoint_has_two_bytes_a_weight(example_folder):
    assert TracedModel.of_folder(example_folder).expert_bytes == (3 * 192 * 384 * 2,) * 8


def test_texts_are_traced_in_windows_of_decoded_tokens(model, tokenizer, example_folder):
    paths = [example_folder.parent / "text" / f"{name}.txt" for name in ("english", "german")]
    described = TracedModel.of_folder(example_folder)
    seen = []
    trace = trace_texts(
        model, tokenizer, described, "tests", paths, window=64, max_tokens=200, batch=2,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert trace.header.sequences == [TracedSequence(n, 64, 0) for n in (0, 0, 0, 1, 1, 1)]
    assert trace.header.texts[1] == TracedText(
        "german.txt", hashlib.sha256(paths[1].read_bytes()).hexdigest()
    )
    assert seen == [(f"{name}.txt", done, 3) for name in ("english", "german") for done in (2, 3)]
    assert trace.experts.shape == (6 * 64, 8, 2)
    again = trace_texts(model, tokenizer, described, "tests", paths[1:], window=64, max_tokens=64)
    assert (again.experts == trace.experts[192:256]).all()
    assert len(windows_of(tokenizer, read_text(paths[0]), 64, 3)) == 3


def test_prompts_are_traced_with_their_continuations(model, tokenizer, example_folder, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("So Jonah arose\n\nimport os\n")
    trace = trace_prompts(
        model, tokenizer, TracedModel.of_folder(example_folder), "tests", [file], max_new_tokens=5
    )
    sizes = [len(tokenizer(prompt)["input_ids"]) for prompt in ("So Jonah arose", "import os")]
    assert trace.header.sequences == [TracedSequence(0, size + 4, size) for size in sizes]


def test_too_short_a_text_and_no_prompt_are_errors(model, tokenizer, example_folder, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(" \n")
    described = TracedModel.of_folder(example_folder)
    with pytest.raises(MoeConvertError, match=r"short\.txt: shorter than a window of 256"):
        trace_texts(model, tokenizer, described, "tests", [file])
    with pytest.raises(MoeConvertError, match=r"short\.txt: the file has no prompts"):
        trace_prompts(model, tokenizer, described, "tests", [file])


def test_a_trace_has_the_number_of_experts_that_the_routers_are_set_to(
    converted, tokenizer, example_folder
):
    model, path = (
        loader.from_pretrained(converted("2bit")),
        example_folder.parent / "text" / "english.txt",
    )
    described = TracedModel.of_folder(converted("2bit"))
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 3
    trace = trace_texts(model, tokenizer, described, "tests", [path], window=16, max_tokens=16)
    assert trace.experts.shape == (16, 8, 3)
    assert trace.header.architecture.num_experts_per_tok == 3
    layer.mlp.gate.top_k = 1
    with pytest.raises(MoeConvertError, match="routers choose 1 to 3 experts for a token"):
        trace_texts(model, tokenizer, described, "tests", [path], window=16, max_tokens=16)
