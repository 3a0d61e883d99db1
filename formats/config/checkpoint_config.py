"""config.json of a source checkpoint: which models and which fields are read."""

from pathlib import Path
from typing import Any

from formats.config.config_gate import gate_config
from formats.config.field_rules import short
from formats.config.model_types import MODEL_TYPES
from formats.config.strict_json import parse
from formats.errors import DamageError, MoeConvertError, SourceError
from formats.files.log_once import warn_once
from formats.files.paths import read_small_source

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""A checkpoint's only weight file, or the index of its shards."""


def model_type_in(folder: Path) -> str | None:
    """Return the model type that config.json in `folder` names; None if missing or not tested."""
    where = str(folder / "config.json")
    try:
        config = parse(read_small_source(folder, "config.json", str(folder)), where)
    except MoeConvertError:
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) and kind in MODEL_TYPES else None


def read_config(folder: Path) -> dict[str, Any]:
    """Read and gate config.json of a source checkpoint.

    One log line names the fields that were dropped or replaced. Raises SourceError for a model that
    this release does not convert.
    """
    if not folder.is_dir():
        raise SourceError(
            f"{folder} is not a folder",
            f"if it is a Hub repository, fetch it: hf download {folder} --local-dir model",
        )
    where = str(folder / "config.json")
    try:
        data = read_small_source(folder, "config.json", str(folder))
    except DamageError as e:
        hint = "name the folder that holds the checkpoint's config.json"
        raise SourceError(e.message, hint) from None
    config = parse(data, where, error=SourceError)
    if not isinstance(config, dict):
        raise SourceError(f"{where}: not an object", "get config.json again")
    _check_model(config, where)
    fields, notes = gate_config(config, where, error=SourceError)
    if notes:
        warn_once(f"{where}: {'; '.join(notes)}")
    return fields


def _check_model(config: dict[str, Any], where: str) -> None:
    kind = config.get("model_type")
    classes = config.get("architectures")
    known = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if known is None or classes not in (None, [known.causal_class]):
        expected = f"{kind!r} with {[known.causal_class]}" if known else ", ".join(MODEL_TYPES)
        raise SourceError(
            f"{where}: model_type {short(kind)}, architectures {short(classes)};"
            f" this release reads {expected}",
            "use a checkpoint of one of the model types that README.md lists",
        )
    if config.get("quantization_config") is not None:
        raise SourceError(
            f"{where}: is quantized already (quantization_config)",
            "use the original bf16 or fp16 checkpoint",
        )
    weights = config.get("transformers_weights")
    if weights not in (None, *WEIGHTS):
        raise SourceError(
            f"{where}: transformers_weights is {short(weights)}, expected {' or '.join(WEIGHTS)}",
            "give the file one of these names and remove the field from config.json",
        )
