"""config.json and tokenizer of a made model: the shapes of known models, and any other numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

from formats.config.model_types import MODEL_TYPES
from formats.errors import RecipeError

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-mixtral"
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
    "mixtral-8x22b": {
        "model_type": "mixtral",
        "num_hidden_layers": 56,
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "max_position_embeddings": 65536,
        "rope_theta": 1e6,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
    "olmoe-7b": {
        "model_type": "olmoe",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
    },
}
"""Name -> fields of the published config.json. Token ids are those of the example's tokenizer."""

SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "top_k": "num_experts_per_tok",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}
"""Argument -> field of config.json. `experts` and `intermediate` depend on the model type."""
SIZE_NAMES = (*SIZES, "experts", "intermediate")


def shape_config(shape: str, **sizes: int | None) -> dict[str, Any]:
    """Return config.json for a key of SHAPES, with other `sizes` (see SIZE_NAMES).

    Raises RecipeError for an unknown name, or if the vocabulary has no room for the tokenizer.
    """
    if shape not in SHAPES:
        raise RecipeError(f"shape {shape!r} is unknown; known are {', '.join(SHAPES)}")
    config = SHAPES[shape] | {"bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"}
    model_type = MODEL_TYPES[config["model_type"]]
    fields = SIZES | {"experts": model_type.experts, "intermediate": model_type.expert_width}
    config |= {fields[name]: size for name, size in sizes.items() if size is not None}
    tokens = len(_vocabulary())
    if config["vocab_size"] < tokens:
        raise RecipeError(
            f"vocab: {config['vocab_size']}, but the tokenizer has {tokens} tokens",
            f"use --vocab {tokens} or more",
        )
    return config


def write_model_files(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, and the example's tokenizer with unused tokens up to `vocab_size`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = _tokenizer()
    vocabulary = tokenizer["model"]["vocab"]
    for token in range(len(vocabulary), config["vocab_size"]):
        vocabulary[f"<unused-{token}>"] = token
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    for name in TOKENIZER_FILES:
        shutil.copyfile(EXAMPLE / name, folder / name)


def _tokenizer() -> dict[str, Any]:
    return dict(json.loads((EXAMPLE / "tokenizer.json").read_text()))


def _vocabulary() -> dict[str, int]:
    return dict(_tokenizer()["model"]["vocab"])
