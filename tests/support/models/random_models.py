"""Small random checkpoints of the admitted model types, in the two layouts of keys that they are
published in.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen3_moe": {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "qwen3_moe with dense layers": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "head_dim": 16,
        "num_hidden_layers": 5,
        "mlp_only_layers": [0, 2],
    },
    "qwen3_moe with every second layer dense": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "head_dim": 16,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "olmoe": {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 48,
        "clip_qkv": 2.0,
    },
}
"""Name, which begins with the model type -> fields of its configuration."""


def make_model(name: str, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Any:
    """The model `name` with seeded weights of usual sizes; `fields` of its configuration go before
    those here.
    """
    config = CONFIG_MAPPING[name.split()[0]](**{**_COMMON, **MODELS[name], **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                values * 0.9 / parameter.shape[-1] ** 0.5
                if parameter.ndim > 1
                else 1 + 0.2 * values
            )
    return model


def write_checkpoint(folder: Path, name: str, *, fused: bool, **fields: Any) -> Path:
    """A checkpoint of `make_model` in `folder`: with keys for each expert, or with all experts of a
    layer in one.
    """
    model = make_model(name, **fields)
    model.save_pretrained(folder)
    if fused:
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
