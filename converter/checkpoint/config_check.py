"""transformers' own word on a source's configuration, before the first weight is read."""

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
    """Computes the first and the last position's rotary embedding, and builds the generation
    config.

    config, generation: gated. `where` is config.json's path. SourceError naming the file and
    transformers' reason: what it cannot build here it could not load after the conversion either.
    """
    from transformers import GenerationConfig

    try:
        built = type(shape.model.base_model.rotary_emb)(copy.deepcopy(shape.model.config))
        last = config["max_position_embeddings"] - 1
        cos, sin = built(torch.empty(1), torch.tensor([[0, last]]))
    # Whatever a foreign library raises for a stranger's values: TypeError, KeyError,
    # ZeroDivisionError and its own.
    except Exception as e:
        raise _refused(where, e) from e
    if cos.shape[-1] != config["head_dim"] or not bool(
        torch.isfinite(cos).all() and torch.isfinite(sin).all()
    ):
        raise SourceError(
            f"{where}: rope_parameters {short(config['rope_parameters'])} give no finite rotation of head_dim,"
            f" {config['head_dim']}, values at every position",
            "correct rope_parameters (or rope_scaling and rope_theta) in config.json",
        )
    try:
        GenerationConfig(**copy.deepcopy(generation or {}))
    except Exception as e:
        raise _refused(where.removesuffix("config.json") + GENERATION_NAME, e) from e


def _refused(where: str, error: Exception) -> SourceError:
    message = f"{where}: transformers refuses it: {type(error).__name__}: {short(str(error))}"
    return SourceError(message, f"correct {where}")
