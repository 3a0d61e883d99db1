"""Vocabularies have the tokens, ids and rules of the source's tokenizer."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from exported_models import export_folder, fields_of
from gguf import GGUFWriter, TokenType
from project_paths import EXAMPLE

import loader
from converter.gguf.vocabulary import Vocabulary, read_vocabulary
from formats.errors import TokenizerError
from formats.files.log_once import warn_once

CONFIG = {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2}
TEXT = ["the cat sat on the mat", "a b c d e f g h", "the theory of the other cats", "1 2 3 45 67"]


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small SentencePiece model, as Mixtral's repository has one."""
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        pad_id=-1,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(
        folder / "tokenizer_config.json", settings | {"unk_token": "<unk>", "add_bos_token": True}
    )
    return folder


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def vocabulary_of(folder: Path, **config: Any) -> Vocabulary:
    return read_vocabulary(loader.load_tokenizer(folder), CONFIG | config, str(folder))


def merged(vocabulary: Vocabulary, text: str) -> list[str]:
    """Merge as llama.cpp does for `llama`: the neighbours with the best score, left ones first."""
    ids = {text: number for number, text in enumerate(vocabulary.tokens)}
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (vocabulary.scores[ids[left + right]], -i)
            for i, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            return symbols
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_scores_give_the_tokens_of_sentencepiece(pieces: Path) -> None:
    vocabulary = vocabulary_of(pieces)
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    for text in [*TEXT, "other hats", "thethethe acts"]:
        assert merged(vocabulary, " " + text) == model.encode_as_pieces(text)


def test_pieces_have_the_types_of_the_model(pieces: Path) -> None:
    vocabulary = vocabulary_of(pieces)
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    size = model.get_piece_size()
    assert vocabulary.tokens[:size] == [model.id_to_piece(i) for i in range(size)]
    assert vocabulary.types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    for i in range(3, size):
        expected = TokenType.BYTE if model.is_byte(i) else TokenType.NORMAL
        assert vocabulary.types[i] == expected
    assert vocabulary.tokens[size] == f"[PAD{size}]"
    assert set(vocabulary.types[size:]) == {TokenType.UNUSED}
    assert len(vocabulary.tokens) == len(vocabulary.scores) == CONFIG["vocab_size"]


def test_rules_of_a_sentencepiece_tokenizer(pieces: Path) -> None:
    vocabulary = vocabulary_of(pieces)
    assert vocabulary.model == "llama"
    assert (vocabulary.adds_bos, vocabulary.adds_eos, vocabulary.adds_space) == (True, False, True)
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unk": 0}


def test_byte_level_tokenizer_is_named_and_complete(wide: Callable[..., Path], tmp_path: Path):
    read = fields_of(export_folder(wide("2bit"), tmp_path / "m.gguf"))
    source = json.loads((EXAMPLE / "tokenizer.json").read_text())["model"]
    assert read["tokenizer.ggml.model"] == "gpt2"
    assert read["tokenizer.ggml.pre"] == "gpt-2"
    assert {text: i for i, text in enumerate(read["tokenizer.ggml.tokens"])} == source["vocab"]
    assert read["tokenizer.ggml.merges"] == [" ".join(pair) for pair in source["merges"]]
    assert read["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert "tokenizer.ggml.scores" not in read
    ids = {name: read[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert read["tokenizer.ggml.add_bos_token"] is True
    assert read["tokenizer.ggml.add_eos_token"] is False
    assert read["tokenizer.ggml.add_space_prefix"] is False
    assert "tokenizer.chat_template" not in read


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Function that edits the example's tokenizer.json and returns its folder."""

    def edit(change: Callable[[dict[str, Any]], None]) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(EXAMPLE / name, folder / name)
        parts = json.loads((EXAMPLE / "tokenizer.json").read_text())
        change(parts)
        write_json(folder / "tokenizer.json", parts)
        return folder

    return edit


def test_added_tokens_keep_text_and_kind(edited: Callable[..., Path]) -> None:
    def add(parts: dict[str, Any]) -> None:
        like = parts["added_tokens"][0]
        parts["added_tokens"].append({**like, "id": 4096, "content": "<|im_start|>"})
        parts["added_tokens"].append({**like, "id": 4097, "content": "[TOOL]", "special": False})

    vocabulary = vocabulary_of(edited(add), vocab_size=4100)
    assert vocabulary.tokens[4096:] == ["<|im_start|>", "[TOOL]", "[PAD4098]", "[PAD4099]"]
    assert vocabulary.types[4096:] == [
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
        TokenType.UNUSED,
    ]


def test_tokens_beyond_the_embeddings_are_refused(edited: Callable[..., Path]) -> None:
    with pytest.raises(TokenizerError, match=r"token 4095 .* beyond the model's 4000 embeddings"):
        vocabulary_of(edited(lambda parts: None), vocab_size=4000)


def test_second_end_token_becomes_eot(edited: Callable[..., Path]) -> None:
    vocabulary = vocabulary_of(edited(lambda parts: None), eos_token_id=[2, 77])
    assert vocabulary.special_ids["eos"] == 2
    assert vocabulary.special_ids["eot"] == 77


def test_end_tokens_that_gguf_cannot_hold_are_named(
    edited: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    vocabulary_of(edited(lambda parts: None), eos_token_id=[2, 77, 78])
    assert "it leaves out [78] of the configuration's eos_token_id [2, 77, 78]" in caplog.text


def test_chat_templates_are_exported_by_name(edited: Callable[..., Path]) -> None:
    folder = edited(lambda parts: None)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool-use.jinja").write_text("{{ tools }}")
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    writer = GGUFWriter(None, "llama")
    vocabulary_of(folder).add_to(writer)
    templates = {
        name: field.value
        for name, field in writer.kv_data[0].items()
        if name.startswith("tokenizer.chat_template")
    }
    assert templates == {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.rag": "{{ documents }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }


def test_llama_3s_pre_tokenizer_is_named(edited: Callable[..., Path]) -> None:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def change(parts: dict[str, Any]) -> None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        byte_level = {**parts["pre_tokenizer"], "use_regex": False}
        steps = [{**split, "invert": False}, byte_level]
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        parts["model"]["ignore_merges"] = True

    assert vocabulary_of(edited(change)).pre == "llama-bpe"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer .*NFC.*known: GPT-2's and Llama 3's"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer .*Whitespace"),
        (
            {"model": {"type": "WordPiece", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}},
            "model is WordPiece, expected BPE",
        ),
    ],
)
def test_tokenizer_that_llama_cpp_would_imitate_wrongly_is_refused(
    edited: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    defaults = {
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    if "model" in change:
        change = {"model": change["model"] | defaults}
    with pytest.raises(TokenizerError, match=message):
        vocabulary_of(edited(lambda parts: parts.update(change)))


def test_merges_without_a_score_order_are_refused(pieces: Path, tmp_path: Path) -> None:
    parts = json.loads(loader.load_tokenizer(pieces).backend_tokenizer.to_str())
    folder = tmp_path / "t"
    shutil.copytree(pieces, folder)
    (folder / "tokenizer.model").unlink()
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    parts["model"]["merges"] = parts["model"]["merges"][1:]
    write_json(folder / "tokenizer.json", parts)
    with pytest.raises(TokenizerError, match=r"exported to GGUF: .* is not a merge") as error:
        vocabulary_of(folder)
    assert "moe-convert generate" in error.value.hint


def test_normalizer_of_older_tokenizers_puts_a_space_before_the_text(
    pieces: Path, tmp_path: Path
) -> None:
    parts = json.loads(loader.load_tokenizer(pieces).backend_tokenizer.to_str())
    space = {"String": " "}
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": space, "content": "▁"}
    parts["pre_tokenizer"] = None
    for name, steps, expected in (("a", [prepend, replace], True), ("b", [replace], False)):
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        parts["normalizer"] = {"type": "Sequence", "normalizers": steps}
        write_json(folder / "tokenizer.json", parts)
        assert vocabulary_of(folder).adds_space == expected
