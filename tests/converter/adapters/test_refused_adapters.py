"""Adapters that do not fit are refused before any weight is read, with a next step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import WEIGHTS, change_config, change_tensors, convert_with, make_adapter
from peft import LoraConfig, get_peft_model
from random_models import make_model, write_checkpoint

from converter.checkpoint.adapters import adapter_folder
from converter.checkpoint.adapters.adapter_folder import AdapterFolder
from converter.checkpoint.source import Checkpoint
from formats.errors import DoesNotFitError, MoeConvertError, SourceError

Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter for `base`, to be changed."""
    return make_adapter(base, tmp_path / "adapter")


def refuse(
    base: Path, adapter: Path, match: str, kind: type[MoeConvertError] = SourceError
) -> MoeConvertError:
    """Return the error that a conversion raises; it must have a next step and write nothing."""
    out = adapter.parent / "out"
    with pytest.raises(kind, match=match) as caught:
        convert_with(base, out, adapter)
    assert caught.value.hint
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; this release merges LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"r": 0}, r"`int` >= 1.*\$\.r"),
        ({"r": "8"}, r"Expected `int`.*\$\.r"),
        ({"lora_alpha": [1]}, r"\$\.lora_alpha"),
        ({"bias": "some"}, r"\$\.bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': it changes the base"),
        ({"lora_bias": True}, "lora_bias is True; this release cannot merge that option"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"option_of_the_future": "x"}, "option_of_the_future is 'x'"),
        ({"target_modules": ["no_such_module"]}, "peft .* cannot load it on this model"),
        ({"target_modules": "(("}, "peft .* cannot load it on this model"),
        ({"target_modules": ["q_proj"]}, "tensors match nothing in the model.*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "tensors are missing.*o_proj"),
        ({"r": 5}, "cannot load it on this model.*size mismatch"),
        ({"layers_to_transform": [0]}, r"match nothing in the model: model\.layers\.1"),
    ],
)
def test_option_that_cannot_be_merged_is_refused_by_name(
    base: Path, adapter: Path, fields: dict[str, Any], match: str
) -> None:
    change_config(adapter, **fields)
    refuse(base, adapter, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"r": 1, "r": 2}', "stands twice"),
        (" " * (2 << 20), "over|bytes"),
    ],
)
def test_damaged_config_is_refused(base: Path, adapter: Path, text: str, match: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    refuse(base, adapter, match)


def with_surplus(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"base_model.model.value_head.weight": torch.zeros(1, 64)}


def without_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != Q_B}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_surplus, "1 of its tensors match nothing in the model: value_head.weight"),
        (without_one, "1 tensors are missing"),
        (lambda t: t | {Q_B: torch.full_like(t[Q_B], torch.nan)}, "NaN or infinite"),
        (lambda t: t | {Q_B: t[Q_B].double()}, "is F64, expected is one of BF16, F16, F32"),
        (lambda t: t | {Q_B: t[Q_B][:, :2].contiguous()}, "size mismatch"),
        (lambda t: t | {Q_B: t[Q_B][:-1].contiguous()}, "size mismatch"),
        (lambda t: {}, "missing"),
    ],
    ids=["surplus", "missing", "nan", "dtype", "rank", "rows", "empty"],
)
def test_tensor_that_does_not_fit_is_refused(
    base: Path, adapter: Path, change: Any, match: str
) -> None:
    change_tensors(adapter, change)
    refuse(base, adapter, match)


def test_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "mixtral", fused=False, num_hidden_layers=4)
    adapter = make_adapter(other, tmp_path / "adapter")
    refuse(base, adapter, r"match nothing in the model: model\.layers\.3")


def test_adapter_with_new_tokens_is_refused_with_both_numbers(base: Path, tmp_path: Path) -> None:
    model = make_model("mixtral")
    model.resize_token_embeddings(130)
    tuned = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    tuned.save_pretrained(tmp_path / "adapter")
    error = refuse(base, tmp_path / "adapter", "has 130 tokens, the base model has 128")
    assert "resize_token_embeddings(130)" in error.hint


def test_adapter_that_unties_head_and_embedding_is_refused(bases: Any, tmp_path: Path) -> None:
    base = bases("qwen3_moe with every second layer dense")
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    refuse(base, adapter, "both embedding and head")


def test_dora_on_an_embedding_is_refused(base: Path, tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens"], "use_dora": True}
    refuse(
        base, make_adapter(base, tmp_path / "adapter", **options), r"DoRA on model\.embed_tokens"
    )


def test_one_of_two_fused_projections_alone_is_refused(base: Path, adapter: Path) -> None:
    change_config(adapter, target_modules=["w1"])
    refuse(base, adapter, "w1 without also targeting w3")


def test_pickled_adapter_is_refused_with_the_reason(base: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    error = refuse(base, adapter, r"pickled weights \(adapter_model.bin\), which can run code")
    assert "save_pretrained" in error.hint


def test_truncated_adapter_is_refused(base: Path, adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-8])
    refuse(base, adapter, "cut off")


def test_folder_without_adapter_is_refused(base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    refuse(base, adapter, "adapter_config.json is missing")
    refuse(base, adapter.with_name("adaptor"), "is not a folder")


def test_adapter_larger_than_the_memory_is_refused(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.checkpoint import merged_weights

    monkeypatch.setattr(merged_weights, "within_group", lambda available, total: (1000, total))
    refuse(base, adapter, "needs [0-9]+ bytes of memory, 1000 are available", DoesNotFitError)


def test_missing_peft_is_named_with_its_install_command(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_folder, "find_spec", lambda name: None)
    error = refuse(base, adapter, "needs the package peft", MoeConvertError)
    assert error.hint == "pip install 'moe-convert[adapters]'"


def test_output_in_the_adapters_folder_is_refused(base: Path, adapter: Path) -> None:
    with pytest.raises(MoeConvertError, match=r"README\.md"):
        convert_with(base, adapter, adapter)


def test_merge_beyond_the_dtype_names_tensor_and_adapter(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", "mixtral", fused=False, dtype=torch.float16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    change_tensors(adapter, lambda t: {name: tensor * 1e4 for name, tensor in t.items()})
    with pytest.raises(SourceError, match=r"q_proj.weight with its adapters has [0-9]+ NaN or inf"):
        convert_with(base, tmp_path / "out", adapter)


def test_model_is_not_changed_by_a_refused_adapter(base: Path, adapter: Path) -> None:
    change_tensors(adapter, with_surplus)
    with Checkpoint(base) as checkpoint:
        before = json.dumps(sorted(checkpoint.shape.trunk))
    with pytest.raises(SourceError):
        Checkpoint(base, [AdapterFolder.open(str(adapter))])
    shutil.rmtree(adapter)
    with Checkpoint(base) as checkpoint:
        assert json.dumps(sorted(checkpoint.shape.trunk)) == before
