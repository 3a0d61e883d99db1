"""Loads an unconverted checkpoint by transformers, as the reference of comparisons.

Reads no pickles and runs no code from its folder.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from formats import INDEX_NAME
from formats.config.checkpoint_config import WEIGHTS, read_config
from formats.config.strict_json import parse
from formats.errors import MoeConvertError, SourceError
from formats.files.paths import read_small
from formats.index import Architecture
from formats.unconverted import check_finished, is_converted
from loader.hf.loading.configuration import loading_options, model_class
from loader.hf.modules.expert_layers import experts_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_runnable(folder: Path) -> None:
    """Raise MoeConvertError unless `folder` has a converted model or a checkpoint's weights.

    Reads no weights.
    """
    if is_converted(folder):
        return
    if not folder.is_dir():
        raise MoeConvertError(
            f"{folder} is not a folder", "name a converted folder or a checkpoint's folder"
        )
    check_finished(folder)
    if not any((folder / name).exists() for name in WEIGHTS):
        raise MoeConvertError(
            f"{folder} has no weights: expected {INDEX_NAME}, {' or '.join(WEIGHTS)}",
            "name a converted folder, or save the checkpoint as safetensors:"
            " pickles are never read",
        )


def vocabulary_size(folder: Path) -> int | None:
    """Return vocab_size of config.json in `folder`, or None if the field is no integer."""
    config = parse(read_small(folder, "config.json", str(folder)), str(folder / "config.json"))
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None


def checkpoint_architecture(folder: Path, config: dict[str, Any]) -> Architecture:
    """Return the architecture of the checkpoint in `folder`. Reads no weights.

    config: the gated config.json. Raises SourceError if transformers rejects one of its values.
    """
    from transformers import AutoModelForCausalLM

    options = loading_options(folder, config, None, error=SourceError)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(options["config"], trust_remote_code=False)
    return Architecture.of_config(config, list(experts_modules(model)))


def load_checkpoint(folder: Path) -> "PreTrainedModel":
    """Load the model in `folder` in its stored dtype, on the CPU.

    Raises SourceError for an unknown model type or a rejected config value, MoeConvertError if
    there are no safetensors files or transformers cannot load them.
    """
    check_runnable(folder)
    options = loading_options(folder, read_config(folder), None, error=SourceError)
    try:
        model = model_class(options["config"]).from_pretrained(
            os.fspath(folder), dtype="auto", **options
        )
    except (OSError, ValueError) as e:
        raise MoeConvertError(
            f"{folder}: transformers cannot load it: {e}",
            "correct the checkpoint's files, or download them again",
        ) from e
    return model.eval()
