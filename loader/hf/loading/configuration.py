"""transformers' configuration objects, built from nothing but what the gates of `formats` let
through.
"""

import copy
from pathlib import Path
from typing import Any

from formats.config.field_rules import short
from formats.config.generation_config import read_generation_config
from formats.config.model_types import MODEL_TYPES
from formats.errors import MoeConvertError


def loading_options(
    folder: Path,
    fields: dict[str, Any],
    attn_implementation: str | None,
    *,
    error: type[MoeConvertError],
    converted: bool = False,
) -> dict[str, Any]:
    """Arguments for the from_pretrained of `model_class`, so that it parses no configuration of
    `folder` itself.

    fields: the gated config.json. attn_implementation: the user's choice; None takes sdpa, or what
    the class supports. Raises `error` naming the file where transformers refuses a value.
    """
    from transformers import AutoConfig, GenerationConfig

    generation = read_generation_config(
        folder, fields["vocab_size"], error=error, converted=converted
    )
    where = folder / "config.json"
    try:
        given = copy.deepcopy(fields)
        config = AutoConfig.for_model(given.pop("model_type"), **given)
        if generation is None:
            defaults = GenerationConfig.from_model_config(copy.deepcopy(fields))
        else:
            where = folder / "generation_config.json"
            defaults = GenerationConfig(**generation)
    # Whatever a foreign library raises for a stranger's values, its own classes among it.
    except Exception as e:
        raise error(
            f"{where}: transformers refuses it: {type(e).__name__}: {short(str(e))}",
            f"correct {where}",
        ) from e
    return {
        "config": config,
        "generation_config": defaults,
        "attn_implementation": attn_implementation
        or ("sdpa" if model_class(config)._supports_sdpa else "eager"),
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
    }


def model_class(config: Any) -> Any:
    """transformers' class of a causal language model with this configuration object.

    By its name: the registry of classes has ours for these configurations
    (loader/hf/by_name/registration.py).
    """
    import transformers

    return getattr(transformers, MODEL_TYPES[config.model_type].causal_class)
