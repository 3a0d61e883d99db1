"""Loading by name: AutoModelForCausalLM, pipeline, AutoTokenizer, lm-eval, transformers' server."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from random_models import write_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    pipeline,
)
from transformers.quantizers import AutoQuantizationConfig

import loader
from formats import JOURNAL_NAME
from formats.errors import NotConvertedError

needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="needs the extra [eval]"
)

PROMPT = "So Jonah arose, and went to"
IDS = torch.tensor([[1, 17, 300, 42]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@pytest.fixture(scope="module")
def folder(converted: Callable[[str], Path]) -> Path:
    return converted("2bit")


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return logits(loader.from_pretrained(folder))


@pytest.fixture(scope="module")
def plain(example_folder: Path) -> Any:
    return MixtralForCausalLM.from_pretrained(example_folder)


def test_auto_model_gives_the_model_that_the_loader_gives(
    folder: Path, expected: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, ram_cache="3MiB")
    assert type(model) is type(loader.from_pretrained(folder))
    assert torch.equal(logits(model), expected)
    assert model.moe_stats().slot_bytes < 3 << 20


def test_pipeline_generates_as_the_loaded_model_does(folder: Path) -> None:
    made = pipeline("text-generation", model=str(folder), model_kwargs={"ram_cache": "3MiB"})
    text = made(PROMPT, max_new_tokens=6, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    model, tokenizer = loader.from_pretrained(folder), loader.load_tokenizer(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert text == tokenizer.decode(generated, skip_special_tokens=True)
    assert made.model.moe_stats().slot_bytes < 3 << 20


def test_auto_tokenizer_gives_the_tokens_of_the_loaders_tokenizer(folder: Path) -> None:
    text = f"{PROMPT} Nineveh.\n\nimport os"
    assert (
        AutoTokenizer.from_pretrained(folder)(text).input_ids
        == loader.load_tokenizer(folder)(text).input_ids
    )


def test_a_hub_repository_loads_by_its_name(
    hub: HubServer, folder: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/tiny-2bit", folder)
    model = AutoModelForCausalLM.from_pretrained("me/tiny-2bit", ram_cache="3MiB")
    assert torch.equal(logits(model), expected)
    assert model.moe_stats().slot_bytes < 3 << 20


def test_a_plain_checkpoint_loads_as_the_plain_class(
    example_folder: Path, tmp_path: Path, plain: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(example_folder)
    assert type(model) is MixtralForCausalLM
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(plain))


def test_a_model_made_of_a_configuration_is_of_the_plain_class() -> None:
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    assert type(AutoModelForCausalLM.from_config(config)) is MixtralForCausalLM


def test_sizes_count_packed_weights_and_experts(folder: Path, plain: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, ram_cache="3MiB")
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(
        exclude_embeddings=True
    )
    assert model.num_parameters(only_trainable=True) < model.num_parameters()
    trunk = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert model.get_memory_footprint() == trunk + model.moe_stats().slot_bytes
    assert trunk < model.get_memory_footprint() < plain.get_memory_footprint()


def test_an_unfinished_conversion_is_named_as_one(converted_copy: Path) -> None:
    (converted_copy / "moe_index.json").rename(converted_copy / JOURNAL_NAME)
    for load in (loader.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            NotConvertedError, match=r"unfinished(.|\n)*run the same convert command again"
        ):
            load(converted_copy)


def test_the_loader_says_how_to_convert_a_plain_checkpoint(example_folder: Path) -> None:
    with pytest.raises(
        NotConvertedError, match=rf"not converted(.|\n)*moe-convert convert {example_folder}"
    ):
        loader.from_pretrained(example_folder)


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["inspect"], ["verify"]], ids=lambda c: c[0]
)
def test_commands_give_the_next_step_for_an_unconverted_folder(
    run_command: Any, example_folder: Path, converted_copy: Path, command: list[str]
) -> None:
    name, *options = command
    code, _, err = run_command(name, example_folder, *options)
    assert code == 1
    assert f"moe-convert convert {example_folder}" in err
    (converted_copy / "moe_index.json").rename(converted_copy / JOURNAL_NAME)
    code, _, err = run_command(name, converted_copy, *options)
    assert code == 1
    assert "unfinished" in err
    assert "run the same convert command again" in err


def test_arguments_of_lm_eval_load_the_model(folder: Path, expected: torch.Tensor) -> None:
    config = AutoConfig.from_pretrained(
        folder, revision="main", trust_remote_code=False, gguf_file=None, subfolder=""
    )
    quantization = AutoQuantizationConfig.from_dict(config.quantization_config)
    model = AutoModelForCausalLM.from_pretrained(
        str(folder),
        revision="main",
        dtype="auto",
        trust_remote_code=False,
        gguf_file=None,
        quantization_config=quantization,
        subfolder="",
        max_memory=None,
        device_map={"": "cpu"},
        ram_cache="3MiB",
    )
    assert torch.equal(logits(model), expected)
    model.tie_weights()
    assert torch.equal(logits(model), expected)


@needs_lm_eval
def test_lm_eval_loads_the_model_by_its_name(folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    question = Instance("loglikelihood", {}, (PROMPT, " Nineveh"), 0)
    named = HFLM(pretrained=str(folder), device="cpu", ram_cache="3MiB")
    given = HFLM(pretrained=loader.from_pretrained(folder), tokenizer=loader.load_tokenizer(folder))
    assert named.model.moe_stats().slot_bytes < 3 << 20
    assert named.loglikelihood([question]) == given.loglikelihood([question])


def test_server_of_transformers_loads_the_model_by_its_name(
    folder: Path, example_folder: Path
) -> None:
    try:
        from transformers.cli.serving.model_manager import ModelManager
    except (ImportError, NameError) as e:
        pytest.skip(f"no server: {e}")
    with loader.defaults(ram_cache="3MiB"):
        manager = ModelManager(device="cpu", force_model=str(folder))
    plain = ModelManager(device="cpu", force_model=str(example_folder))
    try:
        model = next(iter(manager.loaded_models.values())).model
        assert model.moe_stats().slot_bytes < 3 << 20
        assert type(next(iter(plain.loaded_models.values())).model) is MixtralForCausalLM
    finally:
        manager.shutdown()
        plain.shutdown()


def test_a_generation_config_that_is_given_is_used(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, generation_config=GenerationConfig(max_new_tokens=3)
    )
    assert model.generation_config.max_new_tokens == 3


@pytest.mark.parametrize("name", ["qwen3_moe with dense layers", "olmoe"])
def test_other_model_types_load_by_name(
    tmp_path: Path,
    example_folder: Path,
    run_command: Callable[..., tuple[int, str, str]],
    name: str,
) -> None:
    source = write_checkpoint(tmp_path / "source", name, fused=True, vocab_size=4096)
    for file in example_folder.glob("*token*"):
        shutil.copy(file, source)
    folder = tmp_path / "converted"
    assert run_command("convert", source, "-o", folder, "--calibrate", "none")[0] == 0
    expected = logits(loader.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(loader.from_pretrained(folder))
    assert torch.equal(logits(model), expected)
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(source).num_parameters()
    made = pipeline("text-generation", model=str(folder))
    assert made(PROMPT, max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith(PROMPT)
