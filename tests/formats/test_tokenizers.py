"""Strangers' tokenizers load, or a typed error names the file before the conversion begins."""

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

import loader
from converter.calibration.calibration_text import calibration_tokens
from converter.checkpoint.source import Checkpoint
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.config.tokenizer_files import open_tokenizer_by
from formats.errors import MoeConvertError, SourceError, TokenizerError

WITHOUT = make_recipe("2bit", solver="hqq")
CALIBRATED = make_recipe("2bit", calibrate="builtin", calibration_tokens=1024)
Edit = Callable[[Path], None]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def _converted_mini(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "out"
    convert_checkpoint(source, out, WITHOUT)
    return out


@pytest.fixture
def folder(_converted_mini: Path, tmp_path: Path) -> Path:
    """A converted folder, to be broken."""
    return Path(shutil.copytree(_converted_mini, tmp_path / "folder"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 500 tokens."""
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input="examples/text/english.txt",
        model_prefix=str(prefix),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def sets(name: str, *keys: str | int, to: Any) -> Edit:
    """Return an edit of one field of a JSON file."""

    def edit(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        place = data
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to
        (folder / name).write_text(json.dumps(data))

    return edit


def writes(name: str, data: bytes) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return edit


def cuts(name: str) -> Edit:
    return lambda folder: writes(name, (folder / name).read_bytes()[:-100])(folder)


def both(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


CONFIG, SPECIAL = TOKENIZER[1:]
POINTER = b"version https://git-lfs.github.com/spec/v1\n"
HOSTILE: dict[str, tuple[Edit, str]] = {
    "cut": (cuts("tokenizer.json"), "tokenizer.json"),
    "empty": (writes("tokenizer.json", b""), "tokenizer.json"),
    "a list": (writes("tokenizer.json", b"[]"), "tokenizer.json"),
    "an empty object": (writes("tokenizer.json", b"{}"), "tokenizer.json"),
    "not UTF-8": (writes("tokenizer.json", b"\xff\xfe{}"), "tokenizer.json"),
    "deep": (writes("tokenizer.json", b"[" * 100_000), "tokenizer.json"),
    "a pointer": (writes("tokenizer.json", POINTER), " lfs pull"),
    "no model": (sets("tokenizer.json", "model", to=None), "tokenizer.json"),
    "vocabulary of lists": (
        sets("tokenizer.json", "model", "vocab", to={"a": []}),
        "tokenizer.json",
    ),
    "negative id": (sets("tokenizer.json", "model", "vocab", "a", to=-1), "tokenizer.json"),
    "unknown model": (sets("tokenizer.json", "model", "type", to="Evil"), "tokenizer.json"),
    "added tokens of numbers": (
        sets("tokenizer.json", "added_tokens", to=[1, 2]),
        "tokenizer.json",
    ),
    "hostile expression": (
        sets(
            "tokenizer.json",
            "pre_tokenizer",
            to={
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
        "tokenizer.json",
    ),
    "configuration cut": (writes(CONFIG, b'{"bos_token": "<s>'), CONFIG),
    "configuration a list": (writes(CONFIG, b"[1]"), CONFIG),
    "configuration deep": (writes(CONFIG, b'{"a":' * 100_000), CONFIG),
    "own code": (sets(CONFIG, "auto_map", to={"AutoTokenizer": ["own.Own", None]}), CONFIG),
    "own code, old form": (sets(CONFIG, "auto_map", to=["own.Own", None]), CONFIG),
    "a class that loads weights": (
        sets(CONFIG, "tokenizer_class", to="MixtralForCausalLM"),
        CONFIG,
    ),
    "a class that is none": (sets(CONFIG, "tokenizer_class", to=7), CONFIG),
    "a class with a path": (sets(CONFIG, "tokenizer_class", to="../own.OwnTokenizer"), CONFIG),
    "bos a number": (both(sets(CONFIG, "bos_token", to=5), writes(SPECIAL, b"{}")), CONFIG),
    "bos a list": (both(sets(CONFIG, "bos_token", to=["<s>"]), writes(SPECIAL, b"{}")), CONFIG),
    "pad true": (sets(CONFIG, "pad_token", to=True), CONFIG),
    "templates of numbers": (sets(CONFIG, "chat_template", to=[1]), CONFIG),
    "length a word": (sets(CONFIG, "model_max_length", to="long"), CONFIG),
    "side a word": (sets(CONFIG, "padding_side", to="middle"), CONFIG),
    "added tokens a list": (sets(CONFIG, "added_tokens_decoder", to=[1]), CONFIG),
    "added tokens of words": (sets(CONFIG, "added_tokens_decoder", to={"x": "y"}), CONFIG),
    "extra tokens a number": (sets(CONFIG, "extra_special_tokens", to=3), CONFIG),
    "a file outside": (sets(CONFIG, "fast_tokenizer_files", to=["../../tokenizer.1.json"]), CONFIG),
    "special tokens a list": (writes(SPECIAL, b"[]"), SPECIAL),
    "a template that is no text": (
        writes("chat_template.jinja", b"\xff\xff"),
        "chat_template.jinja",
    ),
}
hostile = pytest.mark.parametrize("kind", HOSTILE)


@hostile
def test_a_hostile_tokenizer_is_refused_naming_the_file(checkpoint: Path, kind: str) -> None:
    edit, named = HOSTILE[kind]
    edit(checkpoint)
    with pytest.raises(MoeConvertError) as caught:
        loader.load_tokenizer(checkpoint)
    assert named in str(caught.value)
    assert str(checkpoint) in caught.value.message


@hostile
def test_of_a_converted_folder_too(folder: Path, kind: str) -> None:
    edit, named = HOSTILE[kind]
    if named == "chat_template.jinja":
        pytest.skip("the index does not list it")
    edit(folder)
    with pytest.raises(MoeConvertError) as caught:
        loader.load_tokenizer(folder, check="none")
    assert named in str(caught.value)
    assert str(folder) in caught.value.message
    assert str(Path(tempfile.gettempdir(), "moe-convert-")) not in str(caught.value)


@pytest.mark.parametrize("kind", ["cut", "own code", "length a word"])
def test_calibration_by_a_text_is_refused_before_any_work(checkpoint: Path, kind: str) -> None:
    HOSTILE[kind][0](checkpoint)
    with pytest.raises(SourceError, match="--calibrate random") as caught:
        convert_checkpoint(checkpoint, checkpoint.with_name("out"), CALIBRATED)
    assert HOSTILE[kind][1] in caught.value.message
    assert not checkpoint.with_name("out").exists()


@pytest.mark.parametrize("kind", ["none", "own code"])
def test_without_a_text_it_converts_with_a_warning(
    checkpoint: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "none":
        for name in TOKENIZER:
            (checkpoint / name).unlink()
    else:
        HOSTILE[kind][0](checkpoint)
    out = checkpoint.with_name("out")
    convert_checkpoint(checkpoint, out, WITHOUT)
    assert "no usable tokenizer" in caplog.text
    with pytest.raises(
        TokenizerError, match="has no tokenizer" if kind == "none" else "auto_map"
    ) as caught:
        loader.load_tokenizer(out)
    assert str(out) in caught.value.message


def test_a_checkpoint_without_a_tokenizer_is_not_calibrated_by_a_text(checkpoint: Path) -> None:
    for name in TOKENIZER:
        (checkpoint / name).unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer(?s:.*)--calibrate random \(or none\)"):
        convert_checkpoint(checkpoint, checkpoint.with_name("out"), CALIBRATED)
    assert not checkpoint.with_name("out").exists()


def only_model(folder: Path, data: bytes) -> None:
    for name in TOKENIZER:
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(data)


def test_a_sentencepiece_model_alone_is_enough(checkpoint: Path, model_file: Path) -> None:
    only_model(checkpoint, model_file.read_bytes())
    text = checkpoint.with_name("text.txt")
    text.write_text("Some words about nothing. " * 400)
    with Checkpoint(checkpoint) as source:
        assert calibration_tokens(source, "file", 1024, text).windows.max() < 4096
    convert_checkpoint(checkpoint, checkpoint.with_name("out"), WITHOUT)
    tokenizer = loader.load_tokenizer(checkpoint.with_name("out"))
    assert (
        tokenizer.decode(tokenizer("Hello world", add_special_tokens=False)["input_ids"]).strip()
        == "Hello world"
    )


@pytest.mark.parametrize(
    "missing", [["sentencepiece"], ["google.protobuf"], ["sentencepiece", "google.protobuf"]]
)
def test_packages_that_a_sentencepiece_model_needs_are_named(
    checkpoint: Path, model_file: Path, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only_model(checkpoint, model_file.read_bytes())
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)

    def load(path: str) -> Any:
        raise ValueError(
            "`tiktoken` is required to read a `tiktoken` file. Install it with `pip install "
            "tiktoken`."
        )

    with pytest.raises(TokenizerError, match=r"tokenizer\.model") as caught:
        open_tokenizer_by(load, checkpoint)
    assert caught.value.hint == "pip install sentencepiece protobuf"


def test_what_is_no_sentencepiece_model_is_named(checkpoint: Path) -> None:
    only_model(checkpoint, b"no model" * 100)
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.model: transformers cannot read it"
    ) as caught:
        loader.load_tokenizer(checkpoint)
    assert "tiktoken" not in caught.value.hint


def test_tokens_beyond_the_embeddings_are_warned_of_and_refused_where_used(
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
    run_command: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    added = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
    sets(
        "tokenizer.json",
        "added_tokens",
        to=[*added, {**added[0], "id": 4096, "content": "<|im_start|>"}],
    )(checkpoint)
    out = checkpoint.with_name("out")
    convert_checkpoint(checkpoint, out, WITHOUT)
    assert (
        "1 tokens beyond the model's 4096 embeddings, the last is 4096 ('<|im_start|>')"
        in caplog.text
    )
    text = tmp_path / "text.txt"
    text.write_text("<|im_start|>" + "Some words. " * 200)
    wanted = "token 4096 ('<|im_start|>') is beyond the model's 4096 embeddings"
    for arguments in (
        ("generate", out, "--prompt", "<|im_start|>user"),
        ("eval", out, "--text", text),
        ("trace", out, "--text", text, "-o", tmp_path / "trace"),
        ("trace", out, "--prompts", text, "-o", tmp_path / "trace"),
    ):
        code, _, err = run_command(*arguments, "--kernels", "torch", "-q")
        assert (code, wanted in err) == (1, True), err
    assert run_command("eval", out, "--against", checkpoint, "--text", text, "-q")[0] == 1
    assert (
        run_command(
            "generate", out, "--prompt", "user", "--kernels", "torch", "--max-new-tokens", 2, "-q"
        )[0]
        == 0
    )


def test_commands_say_that_there_is_no_tokenizer(
    folder: Path, run_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    index = json.loads((folder / "moe_index.json").read_text())
    index["files"] = [f for f in index["files"] if f["file"] not in TOKENIZER]
    (folder / "moe_index.json").write_text(json.dumps(index))
    for name in TOKENIZER:
        (folder / name).unlink()
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 200)
    for arguments in (
        ("generate", "--prompt", "a"),
        ("eval", "--text", text),
        ("trace", "--text", text, "-o", tmp_path / "trace"),
    ):  # fmt: skip
        code, _, err = run_command(arguments[0], folder, *arguments[1:], "--kernels", "torch")
        assert (code, f"error: {folder}: has no tokenizer" in err) == (1, True), err


def test_what_the_index_does_not_list_is_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "chat_template.jinja").write_text("a stranger's")
    (folder / "added_tokens.json").write_text('{"<evil>": 7}')
    caplog.set_level(logging.WARNING)
    tokenizer = loader.load_tokenizer(folder)
    assert tokenizer.chat_template is None
    assert "<evil>" not in tokenizer.get_vocab()
    assert tokenizer.name_or_path == str(folder)
    assert "chat_template.jinja is not used: moe_index.json does not list it" in caplog.text


def test_an_adapter_beside_the_index_is_not_loaded(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig.from_dict(json.loads((folder / "config.json").read_text()))
    del config.quantization_config
    peft = get_peft_model(
        MixtralForCausalLM(config), LoraConfig(target_modules=["gate_proj", "q_proj"])
    )
    peft.save_pretrained(str(tmp_path / "adapter"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder)
    model = loader.from_pretrained(folder, kernels="torch")
    assert not any("lora" in name for name, _ in model.named_modules())
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert "adapter_config.json is not used" in caplog.text
    # An adapter that a stranger's index lists is not loaded either.
    index = json.loads((folder / "moe_index.json").read_text())
    index["files"] += [{"file": "adapter_config.json", "size_bytes": 1, "sha256": "0" * 64}]
    (folder / "moe_index.json").write_text(json.dumps(index))
    assert not any(
        "lora" in name
        for name, _ in loader.from_pretrained(folder, kernels="torch").named_modules()
    )
