"""A conversion with adapters has the bytes of PEFT's merge, saved and converted."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    change_config,
    change_tensors,
    convert_with,
    make_adapter,
    make_expert_adapter,
    merged_by_peft,
)
from peft import PeftModel
from project_paths import ROOT
from random_models import write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from converter.checkpoint.adapters.adapter_folder import AdapterFolder
from converter.checkpoint.source import Checkpoint
from converter.recipe.recipes import make_recipe

Bases = Callable[[str], Path]

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "router and head": {
        "target_modules": ["lm_head", "embed_tokens"],
        "target_parameters": ["mlp.gate.weight"],
    },
    "fused experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"q_proj": 5},
        "layers_to_transform": [0, 1],
    },
    "saved modules": {"modules_to_save": ["lm_head", "embed_tokens", "gate", "norm"]},
    "saved experts": {"modules_to_save": ["experts"]},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
}
OLD_NAMES = {
    "mixtral": (
        {
            p: f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{old}"
            for p, old in {"gate": "w1", "up": "w3", "down": "w2"}.items()
        },
        "model.layers.{layer}.block_sparse_moe.gate",
    ),
    **dict.fromkeys(
        ("qwen3_moe", "olmoe"),
        (
            {
                p: f"model.layers.{{layer}}.mlp.experts.{{expert}}.{p}_proj"
                for p in ("gate", "up", "down")
            },
            "model.layers.{layer}.mlp.gate",
        ),
    ),
}


def assert_same_bytes(base: Path, root: Path, *adapters: Path, recipe: Any = None) -> None:
    merged = merged_by_peft(base, root / "merged", *adapters)
    expected = convert_with(merged, root / "expected", recipe=recipe)
    assert convert_with(base, root / "out", *adapters, recipe=recipe) == expected
    assert expected != convert_with(base, root / "without", recipe=recipe)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe with dense layers", "olmoe"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_gives_the_bytes_of_a_merge_by_peft(
    bases: Bases, tmp_path: Path, kind: str, name: str
) -> None:
    adapter = make_adapter(bases(name), tmp_path / "adapter", **ADAPTERS[kind])
    assert_same_bytes(bases(name), tmp_path, adapter)


@pytest.mark.parametrize("name", OLD_NAMES)
def test_experts_by_the_names_of_older_transformers_give_the_same_bytes(
    bases: Bases, tmp_path: Path, name: str
) -> None:
    config = AutoConfig.from_pretrained(bases(name))
    adapter = make_expert_adapter(tmp_path / "adapter", config, *OLD_NAMES[name])
    assert_same_bytes(bases(name), tmp_path, adapter)


def test_dropout_of_the_training_changes_no_byte(base: Path, tmp_path: Path) -> None:
    """PEFT refuses to load this adapter, which its older releases trained."""
    config = AutoConfig.from_pretrained(base)
    adapter = make_expert_adapter(tmp_path / "adapter", config, *OLD_NAMES["mixtral"])
    expected = convert_with(base, tmp_path / "expected", adapter)
    change_config(adapter, lora_dropout=0.05)
    assert convert_with(base, tmp_path / "out", adapter) == expected


def test_adapters_are_merged_one_after_the_other(base: Path, tmp_path: Path) -> None:
    saved = {"modules_to_save": ["lm_head"]}
    one = make_adapter(base, tmp_path / "one", 1, target_modules=["q_proj", "lm_head"])
    two = make_adapter(base, tmp_path / "two", 2, target_modules=["q_proj", "k_proj"], **saved)
    three = make_adapter(base, tmp_path / "three", 3, target_modules=["lm_head", "k_proj"])
    assert_same_bytes(base, tmp_path, one, two, three)


def test_order_of_adapters_matters(base: Path, tmp_path: Path) -> None:
    one = make_adapter(base, tmp_path / "one", target_modules=["lm_head"])
    two = make_adapter(base, tmp_path / "two", modules_to_save=["lm_head"])
    assert convert_with(base, tmp_path / "a", one, two) != convert_with(
        base, tmp_path / "b", two, one
    )


def test_adapter_on_a_tied_embedding_changes_the_head_too(bases: Bases, tmp_path: Path) -> None:
    base = bases("qwen3_moe with every second layer dense")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert_same_bytes(base, tmp_path, adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_of_the_checkpoint_give_the_same_bytes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = write_checkpoint(tmp_path / "base", "mixtral", fused=False, dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS["all-linear"])
    assert_same_bytes(base, tmp_path, adapter)


def test_checkpoint_of_fused_experts_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    fused = write_checkpoint(tmp_path / "fused", "mixtral", fused=True)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS["fused experts"])
    expected = convert_with(base, tmp_path / "expected", adapter)
    assert convert_with(fused, tmp_path / "out", adapter) == expected


@pytest.mark.parametrize("options", [{}, {"target_bpw": 18.0}], ids=["2bit", "target-bpw"])
def test_calibration_and_chosen_bits_see_the_merged_weights(
    bases: Bases, tmp_path: Path, options: dict[str, Any]
) -> None:
    base = bases("qwen3_moe with dense layers")
    adapter = make_adapter(base, tmp_path / "adapter", lora_alpha=32, **ADAPTERS["all-linear"])
    recipe = make_recipe("2bit", calibrate="random", calibration_tokens=1024, **options)
    assert_same_bytes(base, tmp_path, adapter, recipe=recipe)


def test_any_slice_of_rows_has_the_bytes_of_the_whole_matrix(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", r=7, **ADAPTERS["all-linear"])
    with Checkpoint(base, [AdapterFolder.open(str(adapter))]) as checkpoint:
        for weight in (*checkpoint.trunk.values(), *checkpoint.experts.values()):
            rows = weight.shape[0]
            whole = checkpoint.read_rows(weight, 0, rows)
            for step in (1, 7, 40):
                parts = [
                    checkpoint.read_rows(weight, begin, min(begin + step, rows))
                    for begin in range(0, rows, step)
                ]
                assert torch.equal(torch.cat(parts), whole)


def test_adapter_without_effect_gives_the_checkpoints_own_bytes(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", lora_alpha=0)
    assert convert_with(base, tmp_path / "out", adapter) == convert_with(base, tmp_path / "base")


def test_name_of_the_base_model_is_compared_in_a_warning_alone(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    shutil.copytree(adapter, tmp_path / "other")
    change_config(tmp_path / "other", base_model_name_or_path="someone/Other-8x7B")
    with Checkpoint(base, [AdapterFolder.open(str(tmp_path / "other"))]):
        assert "someone/Other-8x7B" in caplog.text
    caplog.clear()
    name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(name) == base
    with Checkpoint(base, [AdapterFolder.open(str(adapter))]):
        assert "the adapter was trained on" not in caplog.text


def test_biases_that_the_adapter_stores_replace_the_models(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "qwen3_moe", fused=False, attention_bias=True)
    adapter = make_adapter(base, tmp_path / "adapter", bias="all")
    change_tensors(adapter, lambda t: {n: x + ("bias" in n) for n, x in t.items()})
    with Checkpoint(base, [AdapterFolder.open(str(adapter))]) as checkpoint:
        bias = checkpoint.trunk["model.layers.0.self_attn.q_proj.bias"]
        assert float(checkpoint.read_rows(bias, 0, 4).float().min()) > 0.5
    assert_same_bytes(base, tmp_path, adapter)


def test_the_code_of_the_page_makes_the_checkpoint_of_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    page = ROOT / "docs" / "adapters.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"PeftModel": PeftModel, "base": model, "adapter": adapter})
    expected = convert_with(tmp_path / "merged", tmp_path / "expected")
    assert convert_with(base, tmp_path / "out", adapter) == expected
