"""PEFT's adapters on the loaded model, and transformers' Trainer with them."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import dequantized
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from project_paths import ROOT
from training import batch, loaded
from transformers import Trainer, TrainingArguments

from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError
from loader.hf.modules.packed_modules import PackedLinear

Folder = Callable[[str], Path]
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folders: 2bit has packed attention, attn16 has 16-bit attention; both have 2-bit experts."""
    root = tmp_path_factory.mktemp("peft")
    recipes = {
        "2bit": make_recipe("2bit", solver="hqq"),
        "attn16": make_recipe("2bit", attn_bits=16, solver="hqq"),
    }

    def of(name: str) -> Path:
        if not (root / name).exists():
            convert_checkpoint(source, root / name, recipes[name])
        return root / name

    return of


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{**LORA, **options}))


def trained_loss(model: Any, rate: float) -> float:
    """Return the loss after 30 steps."""
    ids = batch(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    return losses[-1]


@pytest.mark.parametrize("name", ["2bit", "attn16"])
def test_lora_ends_where_it_ends_on_the_dequantized_model(folder: Folder, name: str) -> None:
    model = adapted(loaded(folder(name), "two"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(layer, PackedLinear) == (name == "2bit")
    exact = trained_loss(adapted(dequantized(folder(name))), 1e-2)
    assert trained_loss(model, 1e-2) == pytest.approx(exact, rel=0.02)


def test_gradients_of_an_adapter_are_those_of_the_dequantized_model(folder: Folder) -> None:
    gradients = []
    for model in (loaded(folder("2bit"), "two"), dequantized(folder("2bit"))):
        tuned = adapted(
            model, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
        )
        tuned(input_ids=batch(), labels=batch()).loss.backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
    ours, exact = gradients
    assert len(ours) == 3 * 4 * 2
    for name, gradient in ours.items():
        cosine = torch.cosine_similarity(
            gradient.flatten().double(), exact[name].flatten().double(), dim=0
        )
        assert 1 - cosine.item() < 1e-6, name


def test_prompt_tuning_ends_where_it_ends_on_the_dequantized_model(folder: Folder) -> None:
    losses = []
    for model in (loaded(folder("2bit")), dequantized(folder("2bit"))):
        torch.manual_seed(0)
        tuned = get_peft_model(
            model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        )
        losses.append(trained_loss(tuned, 0.1))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]),
        LoHaConfig(target_modules=["q_proj"], r=4),
        LoKrConfig(target_modules=["q_proj"], r=4),
        OFTConfig(target_modules=["q_proj"], oft_block_size=16),
        VeraConfig(target_modules=["q_proj", "o_proj"], r=16),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_have_the_gradients_of_the_dequantized_model(
    folder: Folder, config: Any
) -> None:
    config.task_type = "CAUSAL_LM"
    gradients = []
    for model in (loaded(folder("2bit")), dequantized(folder("2bit"))):
        torch.manual_seed(0)
        tuned = get_peft_model(model, copy.deepcopy(config))
        tuned(input_ids=batch(), labels=batch()).loss.backward()
        trained = [p.grad for p in tuned.parameters() if p.requires_grad]
        gradients.append(torch.cat([grad.flatten().double() for grad in trained]))
    ours, exact = gradients
    assert exact.norm() > 0
    assert 1 - torch.cosine_similarity(ours, exact, dim=0).item() < 1e-6


def test_all_linear_layers_are_found_by_their_type(folder: Folder) -> None:
    model = adapted(loaded(folder("2bit")), target_modules="all-linear")
    adapters = {
        name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".base_layer")
    }
    assert adapters >= {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_an_adapter_is_used_in_generation_saved_and_loaded(folder: Folder, tmp_path: Path) -> None:
    model = adapted(loaded(folder("2bit")), init_lora_weights=False).eval()
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 2,
        "eos_token_id": None,
    }

    def logits(each: Any) -> torch.Tensor:
        return torch.stack(each.generate(input_ids=batch(1), **options).logits)

    expected = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(loaded(folder("2bit")), tmp_path).eval()), expected
    )
    with pytest.raises(ValueError, match="not serializable"):
        model.base_model.model.save_pretrained(tmp_path / "whole")


def test_single_tokens_go_through_an_adapter_on_the_router(folder: Folder) -> None:
    options = {
        "target_modules": [],
        "target_parameters": ["mlp.gate.weight"],
        "init_lora_weights": False,
    }
    logits = []
    for model in (loaded(folder("2bit")), dequantized(folder("2bit"))):
        past, rows, tuned = None, [], adapted(model, lora_alpha=64, **options).eval()
        with torch.no_grad():
            for token in batch(1, 10)[0]:
                output = tuned(input_ids=token[None, None], past_key_values=past, use_cache=True)
                past = output.past_key_values
                rows.append(output.logits[0, -1])
        logits.append(torch.stack(rows))
    assert ((logits[0] - logits[1]).norm() / logits[1].norm()).item() < 0.1


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_into_packed_weights_is_refused(folder: Folder, safe: bool) -> None:
    model = adapted(loaded(folder("2bit")), init_lora_weights=False)
    with torch.no_grad():
        expected = model(batch()).logits
    with pytest.raises(MoeConvertError, match="packed"):
        model.merge_adapter(safe_merge=safe)
    with torch.no_grad():
        assert torch.equal(model(batch()).logits, expected)


def test_adapters_that_need_the_values_of_packed_weights_are_refused(folder: Folder) -> None:
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(MoeConvertError, match="packed"):
            adapted(loaded(folder("2bit")), **options)


def test_a_merge_into_attention_in_16_bits_gives_the_adapters_logits(folder: Folder) -> None:
    model = adapted(loaded(folder("attn16")), init_lora_weights=False).eval()
    with torch.no_grad():
        expected = model(batch()).logits
        merged = model.merge_and_unload()(batch()).logits
    assert ((merged - expected).norm() / expected.norm()).item() < 0.03


def test_the_code_of_the_page_runs(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(loaded(folder("2bit")), init_lora_weights=False).save_pretrained(tmp_path / "adapter")
    page = ROOT / "docs" / "gradients.md"
    places = {"my-mixtral-2bit": folder("2bit"), "my-adapter": tmp_path / "adapter"}
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        for name, place in places.items():
            code = code.replace(name, str(place))
        exec(compile(code, page, "exec"), names)
    assert names["loss"].item() > 0
    with_adapter, without = capsys.readouterr().out.splitlines()
    assert with_adapter != without


def trainer(model: Any, out: Path, **options: Any) -> Trainer:
    ids = batch(4)
    arguments = TrainingArguments(
        str(out),
        num_train_epochs=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="epoch",
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_trainer_trains_adapters_as_on_the_dequantized_model(
    folder: Folder, tmp_path: Path, options: dict[str, Any]
) -> None:
    losses = []
    for model in (loaded(folder("2bit"), "two"), dequantized(folder("2bit"))):
        run = trainer(adapted(model), tmp_path, **options)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_trainer_refuses_the_model_without_adapters(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(loaded(folder("2bit")), tmp_path)
