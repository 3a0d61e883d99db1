"""Makes transformers' configuration objects from gated fields only."""

import copy
from pathlib import Path
from typing import Any

from formats.config.field_rules import short
from formats.config.generation_config import read_generation_config
from formats.config.model_types import MODEL_TYPES
from formats.errors import MoeConvertError
from loader.hf.private_names import supports_sdpa


def loading_options(
    folder: Path,
    fields: dict[str, Any],
    attn_implementation: str | None,
    *,
    error: type[MoeConvertError],
    converted: bool = False,
) -> dict[str, Any]:
    """Return the arguments for from_pretrained of `model_class`.

    With them transformers reads no configuration file of `folder` itself.

    fields: the gated config.json.
    attn_implementation: the user's choice. None: sdpa if the class supports it, else eager.
    error: raised with the file's name if transformers rejects a value.
    converted: True for a converted folder, False for a plain checkpoint.
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
    # For untrusted values transformers raises many types, also its own.
    except Exception as e:
        raise error(
            f"{where}: transformers rejects a value: {type(e).__name__}: {short(str(e))}",
            f"correct {where}",
        ) from e
    if attn_implementation is None:
        attn_implementation = "sdpa" if supports_sdpa(model_class(config)) else "eager"
    return {
        "config": config,
        "generation_config": defaults,
        "attn_implementation": attn_implementation,
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
    }


def model_class(config: Any) -> Any:
    """Return transformers' causal language model class for a configuration object.

    It is found by name, because the registries hold a RegistryEntry for these configurations
    (loader/hf/by_name/registration.py).
    """
    import transformers

    return getattr(transformers, MODEL_TYPES[config.model_type].causal_class)
