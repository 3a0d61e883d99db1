"""Lets transformers judge a source's configuration before the first weight is read."""

import copy
from typing import Any

import torch

from converter.checkpoint.model_shape import ModelShape
from formats.config.field_rules import short
from formats.config.generation_config import GENERATION_NAME
from formats.errors import SourceError


def check_with_transformers(
    shape: ModelShape, config: dict[str, Any], generation: dict[str, Any] | None, where: str
) -> None:
    """Compute the rotary embedding of the first and last position; build the generation config.

    SourceError with the file and transformers' reason: what it cannot build now it could not load
    after the conversion. config, generation: already checked fields. where: path of config.json.
    """
    from transformers import GenerationConfig

    try:
        rotary = type(shape.model.base_model.rotary_emb)(copy.deepcopy(shape.model.config))
        last = config["max_position_embeddings"] - 1
        cos, sin = rotary(torch.empty(1), torch.tensor([[0, last]]))
    # A foreign library raises anything for a stranger's values: TypeError, KeyError,
    # ZeroDivisionError and its own errors.
    except Exception as e:
        raise _refused(where, e) from e
    is_finite = bool(torch.isfinite(cos).all() and torch.isfinite(sin).all())
    if cos.shape[-1] != config["head_dim"] or not is_finite:
        raise SourceError(
            f"{where}: rope_parameters {short(config['rope_parameters'])} must give"
            f" {config['head_dim']} (head_dim) finite values at every position",
            "correct rope_parameters (or rope_scaling and rope_theta) in config.json",
        )
    try:
        GenerationConfig(**copy.deepcopy(generation or {}))
    except Exception as e:
        raise _refused(where.removesuffix("config.json") + GENERATION_NAME, e) from e


def _refused(where: str, error: Exception) -> SourceError:
    message = f"{where}: transformers refuses it: {type(error).__name__}: {short(str(error))}"
    return SourceError(message, f"correct {where}")
