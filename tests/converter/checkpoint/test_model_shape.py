"""A model's shape as transformers reports it: layers, experts, tensors, and the names of a
checkpoint's tensors.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import shape_of
from hostile_configs import VALUES
from random_models import MODELS, make_model, write_checkpoint
from torch import nn

from converter.checkpoint.conversion_table import ConversionTable
from converter.checkpoint.experts_probe import computes_gated_silu
from converter.checkpoint.foreign_layouts import foreign_role
from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.names import ExpertTensor, FusedTensor
from converter.checkpoint.source import Checkpoint
from formats.config.model_types import MODEL_TYPES
from formats.errors import MoeConvertError, SourceError
from formats.trunk import ATTENTION

every_model = pytest.mark.parametrize("name", MODELS)
_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def tiny(kind: str, **fields: Any) -> dict[str, Any]:
    return {
        **_TINY,
        "model_type": kind,
        MODEL_TYPES[kind].experts: 4,
        MODEL_TYPES[kind].expert_width: 48,
        **fields,
    }


def spelled_out(kind: str, layer: int, expert: int, projection: str) -> str:
    """An expert's key in a published checkpoint."""
    if kind == "mixtral":
        name = {"gate": "w1", "down": "w2", "up": "w3"}[projection]
        return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"


@every_model
def test_a_shape_is_that_of_the_model(name: str) -> None:
    model = make_model(name)
    shape = shape_of(json.loads(model.config.to_json_string()))
    stored = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    experts = {
        key: size for key, size in stored.items() if key.endswith(("gate_up_proj", "down_proj"))
    }
    assert {f"{module.path}.down_proj" for module in shape.experts} == {
        k for k in experts if k.endswith("down_proj")
    }
    for module in shape.experts:
        assert experts[f"{module.path}.down_proj"] == (
            module.experts,
            module.hidden,
            module.intermediate,
        )
    head = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert shape.trunk == {
        key: size for key, size in stored.items() if key not in experts.keys() | head
    }
    assert len(shape.decoder_layers) == model.config.num_hidden_layers
    assert shape.tied == bool(head)


@every_model
def test_attention_and_an_untied_head_can_be_packed(name: str) -> None:
    shape = shape_of(json.loads(make_model(name).config.to_json_string()))
    expected = [f"{layer}.self_attn.{part}" for layer in shape.decoder_layers for part in ATTENTION]
    assert list(shape.linears) == expected + ([] if shape.tied else ["lm_head"])


def test_a_matrix_with_a_bias_cannot_be_packed() -> None:
    assert list(shape_of(tiny("qwen3_moe", attention_bias=True)).linears) == ["lm_head"]


def test_a_layer_is_counted_among_those_with_experts() -> None:
    shape = shape_of(tiny("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0, 3]))
    assert [module.decoder_layer for module in shape.experts] == [1, 2, 4, 5]
    assert shape.role("model.layers.4.mlp.experts.3.up_proj.weight") == ExpertTensor(2, 3, "up")
    assert shape.decoder_layer("model.layers.3.mlp.up_proj.weight") == 3
    assert shape.role("model.layers.3.mlp.experts.0.up_proj.weight") not in shape.trunk


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_the_conversion_table_knows_every_expert_of_a_published_checkpoint(
    kind: str, projection: str
) -> None:
    # Fails where a release of transformers changed what converter/checkpoint/conversion_table.py
    # asks.
    shape = shape_of(tiny(kind))
    for layer in range(2):
        for expert in range(4):
            found = shape.role(spelled_out(kind, layer, expert, projection))
            assert found == ExpertTensor(layer, expert, projection), (
                f"transformers {transformers.__version__}"
            )


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_the_conversion_table_knows_fused_experts_and_leaves_the_trunk(kind: str) -> None:
    shape = shape_of(tiny(kind))
    for projection in ("gate_up", "down"):
        name = f"model.layers.1.mlp.experts.{projection}_proj"
        assert (
            shape.role(name) == foreign_role(f"{name}.weight", shape) == FusedTensor(1, projection)
        )
    assert [shape.role(name) for name in shape.trunk] == list(shape.trunk)
    assert shape.role("model.layers.0.self_attn.rotary_emb.inv_freq") is None


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_mlx_stacks_are_read_for_every_type(kind: str) -> None:
    name = "model.layers.1.mlp.switch_mlp.up_proj.weight"
    assert foreign_role(name, shape_of(tiny(kind))) == FusedTensor(1, "up")


def test_a_release_without_the_table_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shape_of(tiny("olmoe")).model

    def changed(*_: Any) -> None:
        raise TypeError("takes 3 arguments")

    table = ConversionTable(model, "config.json")
    monkeypatch.setattr(table, "_rename", changed)
    with pytest.raises(
        SourceError, match=f"transformers {transformers.__version__} has no conversion table"
    ):
        table.target("model.norm.weight")


@every_model
def test_a_tensor_that_is_missing_or_misshapen_is_named(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path / "source", name, fused=False)
    # Copies: the file is written over, and safetensors 0.5 maps it.
    good = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    some = (
        [key for key in good if "experts" in key][5],
        "model.layers.1.self_attn.q_proj.weight",
        "model.norm.weight",
    )
    for key in some:
        save_file(
            {**good, key: good[key][:-1].clone()}, folder / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(SourceError, match=f"tensor {key} has shape"):
            Checkpoint(folder)
        save_file(
            {k: t for k, t in good.items() if k != key},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(SourceError, match="1 tensors are missing: "):
            Checkpoint(folder)
    save_file({**good, "model.layers.1.adapter": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(
        SourceError, match=r"1 tensors do not belong to the model: model\.layers\.1\.adapter"
    ):
        Checkpoint(folder)


class _Experts(nn.Module):
    """Gated experts as transformers has them, with an activation and a factor of the caller's."""

    def __init__(self, activation: Any, *, swapped: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, 48, 32, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(4, 32, 24, device="meta"))
        self.bias = nn.Parameter(torch.zeros(4, 32)) if bias else None
        self._activation, self._swapped = activation, swapped

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for rank in range(index.shape[1]):
            for token, expert in enumerate(index[:, rank].tolist()):
                gate, up = (self.gate_up_proj[expert] @ x[token]).chunk(2)
                gate, up = (up, gate) if self._swapped else (gate, up)
                out[token] += weights[token, rank] * (
                    self.down_proj[expert] @ (self._activation(gate) * up)
                )
        return out


def test_the_probe_takes_experts_that_compute_as_ours_do_and_no_others() -> None:
    silu = nn.functional.silu
    assert computes_gated_silu(_Experts(silu))
    assert not computes_gated_silu(_Experts(nn.functional.gelu))
    assert not computes_gated_silu(_Experts(silu, swapped=True))
    assert not computes_gated_silu(_Experts(silu, bias=True))
    assert not computes_gated_silu(_Experts(lambda x: x.clamp(max=0.5).sigmoid()))


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(SourceError, match="no layer of Qwen3MoeForCausalLM has experts"):
        shape_of(tiny("qwen3_moe", mlp_only_layers=[0, 1]))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_hostile_numbers_give_our_error_or_a_model(kind: str) -> None:
    from formats.config.config_gate import gate_config

    for name in MODEL_TYPES[kind].fields:
        for value in VALUES:
            try:
                fields, _ = gate_config(
                    tiny(kind, **{name: value}), "config.json", error=SourceError
                )
                ModelShape(fields, "config.json")
            except MoeConvertError as e:
                assert "config.json" in e.message
                assert e.hint, (name, value)


def test_an_expert_of_five_thousand_digits_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path / "source", "olmoe", fused=False)
    tensors = {
        key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors[f"model.layers.0.mlp.experts.{'9' * 5000}.up_proj.weight"] = torch.zeros(48, 64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.layers\.0\.mlp\.experts\.9999"):
        Checkpoint(folder)


PUBLISHED: dict[str, tuple[dict[str, Any], float, str]] = {
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1e6,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        30.53e9,
        "max_window_layers",
    ),
    "OLMoE-1B-7B": (
        {
            "architectures": ["OlmoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "clip_qkv": None,
            "eos_token_id": 50279,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "model_type": "olmoe",
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
            "use_cache": True,
            "vocab_size": 50304,
        },
        6.92e9,
        "",
    ),
}
"""A published config.json, the parameters of its model, and the field of it that is left out."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_a_model_of_its_published_size(name: str) -> None:
    from formats.config.config_gate import gate_config

    config, parameters, left_out = PUBLISHED[name]
    fields, notes = gate_config(config, "config.json", error=SourceError)
    assert [note.split("'")[1] for note in notes] == ([left_out] if left_out else [])
    shape = ModelShape(fields, "config.json")
    count = sum(prod(size) for size in shape.trunk.values())
    count += sum(
        3 * module.experts * module.hidden * module.intermediate for module in shape.experts
    )
    assert count == pytest.approx(parameters, rel=1e-3)
