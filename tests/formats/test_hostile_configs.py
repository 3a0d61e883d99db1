"""Hostile config.json and generation_config.json work or raise a typed error in every command."""

import importlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_configs import CODE, CONFIGS, GENERATION_CONFIGS, KERNEL
from make_checkpoint import SHAPES, make_checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.integrations import hub_kernels

import loader
from converter.checkpoint.source import Checkpoint
from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.config.config_gate import RUN_TIME
from formats.errors import DamageError, FormatError, MoeConvertError, SourceError
from formats.reading.verify import verify_folder
from loader.hf.loading.configuration import loading_options
from loader.hf.loading.plain_checkpoint import load_checkpoint

PROMPT = torch.tensor([[1, 5, 9]])
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer, whose config.json tests change."""
    folder = tmp_path_factory.mktemp("plain") / "one"
    make_checkpoint(folder, SHAPES["mini"], 1)
    return folder


@pytest.fixture(scope="module")
def converted_plain(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(plain, tmp_path_factory.mktemp("converted-plain") / "out")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "source"))


@pytest.fixture
def ours(converted_plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted_plain, tmp_path / "ours"))


def convert(source: Path, out: Path) -> Path:
    convert_checkpoint(source, out, make_recipe("4bit", solver="hqq"))
    return out


def edit(folder: Path, changes: dict[str, Any], name: str = "config.json") -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path, **options: Any) -> Any:
    return loader.from_pretrained(
        folder, device="cpu", kernels="torch", ram_cache="1GiB", **options
    )


def each_config(folder: Path) -> Iterator[tuple[int, str]]:
    """Write one hostile config.json after another."""
    good = json.loads((folder / "config.json").read_text())
    for number, (name, changes) in enumerate(CONFIGS.items()):
        (folder / "config.json").write_text(json.dumps(good | changes))
        yield number, name


def each_generation_config(folder: Path) -> Iterator[tuple[int, str]]:
    for number, (name, value) in enumerate(GENERATION_CONFIGS.items()):
        (folder / "generation_config.json").write_text(json.dumps(value))
        yield number, name


def described(error: MoeConvertError, name: str, folder: Path) -> None:
    """Check that the error names its file, and a next step or a tensor that contradicts it."""
    assert error.message.startswith(str(folder)), (name, error)
    assert error.hint or "config.json says" in error.message, (name, error)


@pytest.mark.parametrize("each", [each_config, each_generation_config])
def test_a_hostile_source_is_refused_or_opened(
    folder: Path, each: Callable[[Path], Iterator[tuple[int, str]]]
) -> None:
    opened = refused = 0
    for _, name in each(folder):
        try:
            with Checkpoint(folder):
                opened += 1
        except MoeConvertError as e:
            described(e, name, folder)
            refused += 1
    assert opened > 20
    assert refused > 20


@pytest.mark.parametrize("each", [each_config, each_generation_config])
def test_a_hostile_converted_folder_is_refused_or_generates(
    ours: Path, each: Callable[[Path], Iterator[tuple[int, str]]]
) -> None:
    taken = refused = 0
    for number, name in each(ours):
        try:
            artifact = Artifact.open(ours)
            loading_options(ours, artifact.config, None, error=FormatError, converted=True)
            taken += 1
            if taken % 10 == 0 or number > len(CONFIGS) - 100 > 0:
                model = load(ours)
                assert (
                    model.generate(PROMPT, max_new_tokens=2, min_length=0, do_sample=False).shape[1]
                    > 3
                )
        except MoeConvertError as e:
            described(e, name, ours)
            refused += 1
    assert taken > 20
    assert refused > 20


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**63},
        {"pad_token_id": 4096},
        {"rope_scaling": {"type": "su"}},
        {"eos_token_id": "x"},
    ],
)
def test_each_command_says_what_is_wrong_with_a_config(
    changes: dict[str, Any],
    folder: Path,
    ours: Path,
    tmp_path: Path,
    run_command: Callable[..., tuple[int, str, str]],
) -> None:
    edit(folder, changes)
    edit(ours, changes)
    (tmp_path / "text.txt").write_text("a b c d e f " * 400)
    text = tmp_path / "text.txt"
    for arguments in (
        ("convert", folder, "-o", tmp_path / "out", "--dry-run"),
        ("convert", folder, "-o", tmp_path / "out"),
        ("plan", folder),
        ("eval", folder, "--text", text),
        ("trace", folder, "--text", text, "-o", tmp_path / "trace"),
        ("generate", ours, "--prompt", "a"),
        ("eval", ours, "--text", text),
        ("plan", ours),
        ("inspect", ours),
        ("trace", ours, "--text", text, "-o", tmp_path / "trace"),
    ):
        code, _, err = run_command(*arguments)
        assert code in (1, 3), (arguments, err)
        assert f"config.json: {next(iter(changes))}" in err
    (problem,) = verify_folder(ours).problems
    assert problem.file == "config.json"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls of transformers' kernel loader; nothing is fetched."""
    calls: list[str] = []

    def record(*arguments: Any, **options: Any) -> Any:
        calls.append(repr(arguments))
        raise AssertionError(f"a kernel was loaded: {arguments}")

    for module in (hub_kernels, importlib.import_module("transformers.modeling_utils")):
        for name in ("get_kernel", "load_and_register_attn_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, record)
    return calls


def test_a_kernel_named_by_a_source_is_not_loaded_and_not_written(
    folder: Path, tmp_path: Path, kernel_calls: list[str]
) -> None:
    # transformers_weights is refused instead of dropped (test_source_kinds.py).
    edit(folder, {name: value for name, value in CODE.items() if name != "transformers_weights"})
    out = convert(folder, tmp_path / "out")
    text = (out / "config.json").read_text()
    assert KERNEL not in text
    assert json.loads(text).keys().isdisjoint(CODE)
    assert load(out).config._attn_implementation == "sdpa"
    assert load_checkpoint(folder).config._attn_implementation == "sdpa"
    assert kernel_calls == []


@pytest.mark.parametrize(
    "name", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
def test_a_kernel_named_by_a_converted_folder_is_refused_before_transformers_sees_it(
    name: str, ours: Path, kernel_calls: list[str]
) -> None:
    edit(ours, {name: KERNEL})
    with pytest.raises(FormatError) as caught:
        load(ours)
    assert str(ours / "config.json") in caught.value.message
    assert f"'{name}' is '{KERNEL}'" in caught.value.message
    assert f"remove '{name}'" in caught.value.hint
    assert kernel_calls == []


def test_the_caller_chooses_the_attention(ours: Path) -> None:
    assert load(ours, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_scaled_rotation_without_head_dim_loads_after_the_conversion(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    edit(folder, {"rope_scaling": {**YARN, "type": kind}, "head_dim": None})
    out = convert(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["head_dim"] == 16
    assert load(out)(PROMPT).logits.isfinite().all()


def test_fields_left_to_transformers_defaults_are_read_and_written(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    left = (
        "num_experts_per_tok",
        "hidden_act",
        "rms_norm_eps",
        "tie_word_embeddings",
        "architectures",
        "use_cache",
    )
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in left})
    )
    written = json.loads((convert(folder, tmp_path / "out") / "config.json").read_text())
    assert written["num_experts_per_tok"] == 2
    assert written["rms_norm_eps"] == 1e-5
    assert load(tmp_path / "out")(PROMPT).logits.isfinite().all()


def test_a_source_with_a_null_quantization_config_is_read(folder: Path) -> None:
    edit(folder, {"quantization_config": None, "hidden_act": "swish"})
    with Checkpoint(folder) as checkpoint:
        assert "quantization_config" not in checkpoint.config


def test_generation_fields_that_select_code_are_not_written(folder: Path, tmp_path: Path) -> None:
    edit(
        folder,
        {"custom_generate": "a/b", "cache_implementation": "x", "temperature": 0.6},
        "generation_config.json",
    )
    out = convert(folder, tmp_path / "out")
    written = json.loads((out / "generation_config.json").read_text())
    assert written.keys() == {
        "_from_model_config",
        "bos_token_id",
        "eos_token_id",
        "transformers_version",
        "temperature",
    }
    assert load(out).generation_config.temperature == 0.6


def test_the_defaults_of_generate_are_those_of_plain_transformers(
    folder: Path, tmp_path: Path
) -> None:
    edit(
        folder,
        {"temperature": 0.6, "do_sample": True, "eos_token_id": [2, 3]},
        "generation_config.json",
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert load(convert(folder, tmp_path / "out")).generation_config == theirs


def test_without_a_generation_config_the_defaults_come_from_config_json(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder, {"eos_token_id": [2, 7]})
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config
    ours = load(convert(folder, tmp_path / "out")).generation_config
    assert isinstance(ours, GenerationConfig)
    assert ours == theirs


def test_experts_per_token_may_be_changed_in_config_json(
    ours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load(ours)(PROMPT).logits
    edit(ours, {"num_experts_per_tok": 3})
    with caplog.at_level(logging.WARNING):
        model = load(ours)
    lines = [line for line in caplog.messages if "num_experts_per_tok" in line]
    assert len(lines) == 1
    assert "num_experts_per_tok is 3, 2 when it was converted" in lines[0]
    assert Artifact.open(ours).architecture.num_experts_per_tok == 3
    assert model.model.layers[0].mlp.gate.top_k == 3
    assert not torch.equal(model(PROMPT).logits, before)
    assert model.generate(PROMPT, max_new_tokens=4, do_sample=False).shape == (1, 7)


RUN_TIME_EDITS: dict[str, Any] = {
    "transformers_version": "5.0",
    "dtype": "float32",
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 3,
    "eos_token_id": [2, 7],
    "attention_dropout": 0.5,
    "num_experts_per_tok": 3,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
}
OTHER_EDITS: dict[str, Any] = {
    "rms_norm_eps": 1e-3,
    "sliding_window": 32,
    "vocab_size": 4095,
    "head_dim": 8,
}


def test_every_field_that_may_be_edited_is_tried() -> None:
    assert RUN_TIME_EDITS.keys() == set(RUN_TIME)


@pytest.mark.parametrize("name", RUN_TIME)
def test_run_time_fields_may_be_changed_with_a_warning(
    name: str, ours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(ours, {name: RUN_TIME_EDITS[name]})
    with caplog.at_level(logging.WARNING):
        Artifact.open(ours)
        Artifact.open(ours)
    (line,) = [line for line in caplog.messages if "when it was converted" in line]
    assert line.startswith(f"{ours / 'config.json'}: {name} is ")


@pytest.mark.parametrize("name", OTHER_EDITS)
def test_other_fields_belong_to_the_weights(name: str, ours: Path) -> None:
    edit(ours, {name: OTHER_EDITS[name]})
    with pytest.raises(
        DamageError, match=rf"config\.json: {name} is .*moe_index\.json says .*the weights"
    ) as caught:
        load(ours, check="none")
    assert caught.value.hint.startswith(f"moe-convert repair {ours}")


def test_the_tokenizer_is_loaded_without_reading_config_json(ours: Path) -> None:
    (ours / "config.json").write_text('{"model_type": "mixtral", "num_labels": "x"}')
    assert loader.load_tokenizer(ours)("a")["input_ids"]


def test_another_size_is_damage_and_named_with_both_values(ours: Path) -> None:
    edit(ours, {"intermediate_size": 128})
    with pytest.raises(FormatError, match=r"intermediate_size is 128, .*moe_index\.json says 96"):
        Artifact.open(ours)


def test_a_config_saved_again_by_transformers_loads(ours: Path) -> None:
    model = load(ours)
    before = model(PROMPT).logits
    model.config.save_pretrained(ours)
    assert torch.equal(load(ours)(PROMPT).logits, before)


def test_a_rotation_that_transformers_cannot_compute_is_found_before_the_first_weight(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a foreign error")

    monkeypatch.setattr(MixtralRotaryEmbedding, "__init__", fail)
    with pytest.raises(
        SourceError,
        match=r"config\.json: transformers refuses it: ZeroDivisionError.*a foreign error",
    ):
        Checkpoint(folder)
