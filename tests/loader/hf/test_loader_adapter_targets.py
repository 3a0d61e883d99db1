"""Targets of PEFT's adapters on models with packed weights: used, or refused by name."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import load
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from random_models import make_model, write_checkpoint
from safetensors.torch import load_file, save_file

from converter.convert import convert_checkpoint
from converter.recipe.recipes import make_recipe
from formats.errors import MoeConvertError
from formats.files.log_once import warn_once
from loader.arithmetic import kernels

Folder = Callable[..., Path]
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
MERGE = r"(?s:.*)next: merge the adapter .*moe-convert convert BASE --adapter ADAPTER -o OUT"
IDS = torch.randint(3, 120, (1, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def peft_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the patch of PEFT that `load_adapter` of transformers 5.3 leaves in the process."""
    monkeypatch.setattr(ParamWrapper, "update_layer", ParamWrapper.update_layer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Function (family, bits of the head) -> folder of a random model at 2 bits."""
    root = tmp_path_factory.mktemp("adapters")

    def of(family: str = "mixtral", head_bits: int = 16) -> Path:
        out = root / f"{family}-{head_bits}"
        if not out.exists():
            source = root / family
            if not source.exists():
                write_checkpoint(source, family, fused=False)
            convert_checkpoint(source, out, make_recipe("2bit", solver="hqq", head_bits=head_bits))
        return out

    return of


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options})


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits[0]
    return result


@torch.no_grad()
def token_logits(model: Any) -> torch.Tensor:
    """Logits of the same tokens, each in a call of its own."""
    past, rows = None, []
    for token in IDS[0]:
        output = model(input_ids=token[None, None], past_key_values=past, use_cache=True)
        past = output.past_key_values
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


def adapted_layers(model: Any) -> set[str]:
    return {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("base_layer")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("targets", "head_bits"),
    [
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 16),
        ({"target_modules": ["lm_head"]}, 16),
        ({"target_modules": ["lm_head"]}, 4),
        ({"target_modules": ["embed_tokens", "q_proj"]}, 16),
        ({"target_modules": [], "target_parameters": ["mlp.gate.weight"]}, 16),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, 16),
        ({"target_modules": ["q_proj"], "use_rslora": True}, 16),
    ],
)
def test_prompts_and_single_tokens_go_through_the_adapter_and_all_of_it_is_trained(
    folder: Folder, family: str, targets: dict[str, Any], head_bits: int
) -> None:
    model = adapted(load(folder(family, head_bits)), lora(**targets))
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).norm() > 0.05 * expected.norm()
    assert (token_logits(model) - expected).norm() < 1e-4 * expected.norm()
    model(IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.parametrize(
    ("family", "config", "word"),
    [
        ("mixtral", lora(target_modules=["w1", "w2", "w3"]), r"experts\.0\.w1"),
        ("mixtral", lora(target_modules=["q_proj", "w2"]), r"experts\.0\.w2"),
        (
            "mixtral",
            lora(target_modules=r".*q_proj|.*block_sparse_moe\.experts\.3\.w1"),
            r"block_sparse_moe\.experts\.3\.w1",
        ),
        ("qwen3_moe", lora(target_modules=["q_proj", "up_proj"]), r"experts\.0\.up_proj"),
        ("olmoe", lora(target_modules=r".*(v|gate|down)_proj"), r"experts\.down_proj"),
        ("olmoe", lora(target_modules=["experts"]), r"mlp\.experts is"),
        ("olmoe", LoHaConfig(target_modules=["q_proj", "down_proj"]), r"experts\.down_proj"),
        (
            "qwen3_moe",
            IA3Config(
                target_modules=["k_proj", "down_proj"],
                feedforward_modules=["down_proj"],
                task_type="CAUSAL_LM",
            ),
            r"experts\.down_proj",
        ),
        *(
            (
                family,
                lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
                r"layers\.0\.mlp\.experts\.gate_up_proj",
            )
            for family in FAMILIES
        ),
    ],
)
def test_packed_experts_are_refused_by_name_and_the_model_stays_as_it_was(
    folder: Folder, family: str, config: Any, word: str
) -> None:
    model = load(folder(family))
    expected = logits(model)
    with pytest.raises(MoeConvertError, match=word + MERGE):
        get_peft_model(model, config)
    assert not adapted_layers(model)
    assert torch.equal(logits(model), expected)
    if not isinstance(config, LoraConfig):
        return
    both = adapted(model, lora(target_modules=["q_proj"]))
    with pytest.raises(MoeConvertError, match=word + MERGE):
        both.add_adapter("second", config)
    assert list(both.peft_config) == ["default"]


def test_experts_are_refused_if_peft_is_imported_after_the_model_was_loaded(
    folder: Folder,
) -> None:
    code = f"""
import sys, loader
model = loader.from_pretrained({str(folder())!r}, device="cpu", ram_cache="1GiB")
assert "peft.tuners" not in sys.modules
from peft import LoraConfig, get_peft_model
get_peft_model(model, LoraConfig(target_modules=["q_proj", "w1"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MoeConvertError: target_modules ['q_proj', 'w1']" in run.stderr


@pytest.mark.parametrize(
    ("options", "head_bits", "message"),
    [
        (
            {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]},
            16,
            r"modules_to_save 'q_proj': model\.layers\.0\.self_attn\.q_proj is packed",
        ),
        (
            {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
            4,
            r"modules_to_save 'lm_head': lm_head is packed",
        ),
        (
            {"target_modules": ["v_proj"], "modules_to_save": ["self_attn"]},
            16,
            r"modules_to_save 'self_attn': .*q_proj is packed",
        ),
        (
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            16,
            r"target_parameters 'q_proj\.weight'(?s:.*)target_modules=\['q_proj'\]",
        ),
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            16,
            r"use_dora=True needs the values of .*q_proj(?s:.*)--attn-bits 16",
        ),
        (
            {"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"},
            16,
            r"init_lora_weights='pissa_niter_4' needs the values of",
        ),
    ],
)
def test_what_packed_linear_layers_cannot_have_is_refused_by_name(
    folder: Folder, options: dict[str, Any], head_bits: int, message: str
) -> None:
    model = load(folder(head_bits=head_bits))
    with pytest.raises(MoeConvertError, match=message):
        get_peft_model(model, lora(**options))
    assert not adapted_layers(model)


def test_dora_on_a_head_in_16_bits_works_beside_packed_attention(folder: Folder) -> None:
    model = adapted(load(folder()), lora(target_modules=["lm_head"], use_dora=True))
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_says_that_experts_get_none_and_its_adapter_loads_again(
    folder: Folder, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = adapted(load(folder(family)), lora(target_modules="all-linear"))
    assert "all-linear: packed experts get no adapter" in caplog.text
    assert adapted_layers(model) >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder(family)), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_with_experts_is_refused(
    folder: Folder, family: str, tmp_path: Path
) -> None:
    targets = ["mlp.experts.gate_up_proj"]
    plain = get_peft_model(
        make_model(family), lora(target_modules=["q_proj"], target_parameters=targets)
    )
    plain.save_pretrained(tmp_path)
    with pytest.raises(MoeConvertError, match=r"target_parameters .*gate_up_proj" + MERGE):
        PeftModel.from_pretrained(load(folder(family)), tmp_path)
    with pytest.raises(MoeConvertError, match=r"target_parameters .*gate_up_proj" + MERGE):
        load(folder(family)).load_adapter(str(tmp_path))


def test_weights_of_experts_that_the_configuration_does_not_name_are_refused(
    folder: Folder, tmp_path: Path
) -> None:
    adapted(load(folder()), lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"
    save_file({**load_file(file), name: torch.ones(4, 64)}, file)
    with pytest.raises(MoeConvertError, match=r"layers\.1\.mlp\.experts.*lora_A" + MERGE):
        PeftModel.from_pretrained(load(folder()), tmp_path)


def test_an_adapter_for_a_packed_module_that_the_trainer_saved_whole_is_refused(
    folder: Folder, tmp_path: Path
) -> None:
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(make_model("mixtral"), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    with pytest.raises(MoeConvertError, match="lm_head is packed"):
        PeftModel.from_pretrained(load(folder(head_bits=4)), tmp_path)
    assert PeftModel.from_pretrained(load(folder()), tmp_path) is not None


def test_models_without_packed_weights_get_adapters_on_their_experts() -> None:
    model = get_peft_model(
        make_model("mixtral"),
        lora(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    assert adapted_layers(model) == {"experts"}


def test_a_merge_names_the_command_that_merges_before_quantizing(folder: Folder) -> None:
    model = adapted(load(folder()), lora(target_modules=["q_proj"]))
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MoeConvertError, match=r"packed(?s:.*)convert BASE --adapter ADAPTER"):
            merge()
        assert torch.equal(logits(model), expected)


@pytest.mark.skipif(not kernels.available(), reason="not built")
def test_the_decoder_says_that_an_adapter_stops_it_and_runs_again_without(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    base = load(folder(), kernels="auto")

    def paths(model: Any) -> tuple[int, dict[str, int]]:
        base.reset_moe_stats()
        model.generate(
            input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        stats = base.moe_stats().paths
        return stats.decoder, stats.reasons

    prompt = {"prompt": IDS.numel()}
    model = adapted(base, lora(target_modules=["q_proj"]))
    assert paths(model) == (0, {**prompt, "adapter": 3})
    assert "adapter: model.layers.0.self_attn.q_proj" in caplog.text
    assert "moe-convert convert BASE --adapter ADAPTER" in caplog.text
    assert paths(model.unload()) == (3, prompt)
    again = adapted(base, lora(target_modules=["q_proj"]))
    assert paths(again) == (0, {**prompt, "adapter": 3})
    assert paths(again.unload()) == (3, prompt)


def test_several_adapters_switch_turn_off_and_unload(folder: Folder) -> None:
    base = load(folder())
    plain = logits(base)
    model = adapted(base, lora(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", lora(target_modules=["o_proj"]))
    first = logits(model)
    model.set_adapter("second")
    second = logits(model.eval())
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    results = [plain, first, second, both]
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model.unload()), plain)


def test_transformers_own_method_loads_the_same_adapter(folder: Folder, tmp_path: Path) -> None:
    model = adapted(load(folder()), lora(target_modules=["q_proj", "o_proj"]))
    model.save_pretrained(tmp_path)
    other = load(folder())
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other), logits(model))
