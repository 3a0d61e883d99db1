"""config.json of an ordinary checkpoint: which models are read, and what of it may reach
transformers.
"""

from pathlib import Path
from typing import Any

from formats.config.field_rules import short
from formats.config.model_config import gate_config
from formats.config.model_types import MODEL_TYPES
from formats.config.strict_json import parse
from formats.errors import DamageError, MoeConvertError, SourceError
from formats.files.log_once import warn_once
from formats.files.paths import read_small_source

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""The file with a checkpoint's weights, or the index of its shards."""


def model_type_in(folder: Path) -> str | None:
    """The model type that config.json in `folder` names; None where there is no such file, or no
    tested type.
    """
    try:
        config = parse(
            read_small_source(folder, "config.json", str(folder)), str(folder / "config.json")
        )
    except MoeConvertError:
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) and kind in MODEL_TYPES else None


def read_config(folder: Path) -> dict[str, Any]:
    """The gated config.json of a model that this release converts; SourceError for any other.

    One log line says what was left out or replaced.
    """
    if not folder.is_dir():
        raise SourceError(
            f"{folder} is not a folder",
            f"if it is a Hub repository, fetch it: hf download {folder} --local-dir model",
        )
    where = str(folder / "config.json")
    try:
        config = parse(
            read_small_source(folder, "config.json", str(folder)), where, error=SourceError
        )
    except DamageError as e:
        raise SourceError(
            e.message, "name the folder that holds the checkpoint's config.json"
        ) from None
    if not isinstance(config, dict):
        raise SourceError(f"{where}: not an object", "get config.json again")
    kind, classes = config.get("model_type"), config.get("architectures")
    known = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if known is None or classes not in (None, [known.causal_class]):
        expected = f"{kind!r} with {[known.causal_class]}" if known else ", ".join(MODEL_TYPES)
        raise SourceError(
            f"{where}: model_type {short(kind)}, architectures {short(classes)}; read is {expected}",
            "use a checkpoint of one of the model types that README.md lists",
        )
    if config.get("quantization_config") is not None:
        raise SourceError(
            f"{where}: is quantized already (quantization_config)",
            "use the original bf16 or fp16 checkpoint",
        )
    if (named := config.get("transformers_weights")) not in (None, *WEIGHTS):
        raise SourceError(
            f"{where}: transformers_weights is {short(named)}; read are {' and '.join(WEIGHTS)}",
            "give the file one of these names and remove the field from config.json",
        )
    fields, notes = gate_config(config, where, error=SourceError)
    if notes:
        warn_once(f"{where}: {'; '.join(notes)}")
    return fields
