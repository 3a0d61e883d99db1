"""Checkpoints whose config.json is changed."""

import json
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 12},
    "window of the text's length": {"sliding_window": 48},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "max_position_embeddings": 64,
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8,
            "long_factor": [1.5 + i / 4 for i in range(8)],
        },
        "max_position_embeddings": 64,
    },
    "beyond the longest position": {"max_position_embeddings": 16},
    "rope_parameters": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "dropout and jitter": {"attention_dropout": 0.5, "router_jitter_noise": 0.5},
    "eager": {"attn_implementation": "eager"},
    "three experts": {"num_experts_per_tok": 3},
}


def with_config(folder: Path, out: Path, changes: dict[str, Any]) -> Path:
    """A checkpoint of the same weights whose config.json is changed; fields set to None are
    removed.

    head_dim is said: transformers 5.24 does not derive it for all kinds of scaled positions.
    """
    out.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"head_dim": 16} | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return out
