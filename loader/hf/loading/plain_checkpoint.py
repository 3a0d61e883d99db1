"""An ordinary checkpoint as transformers loads it, without pickles and without code from its
folder: for comparison.
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
from formats.repair.unconverted import check_finished
from loader.hf.loading.configuration import loading_options, model_class
from loader.hf.modules.expert_layers import experts_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds what moe-convert wrote, or at least its index."""
    return (folder / INDEX_NAME).exists()


def check_runnable(folder: Path) -> None:
    """MoeConvertError unless `folder` has a converted model or the weights of a checkpoint; reads
    none of them.
    """
    if is_converted(folder):
        return
    if not folder.is_dir():
        raise MoeConvertError(
            f"{folder} is not a folder", "name a converted folder, or a folder with a checkpoint"
        )
    check_finished(folder)
    if not any((folder / name).exists() for name in WEIGHTS):
        raise MoeConvertError(
            f"{folder}: neither {INDEX_NAME} nor {' nor '.join(WEIGHTS)}",
            "name a converted folder, or save the checkpoint as safetensors; pickles are never read",
        )


def vocabulary_size(folder: Path) -> int | None:
    """The number of embeddings that config.json in `folder` says, None if it says none."""
    config = parse(read_small(folder, "config.json", str(folder)), str(folder / "config.json"))
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None


def checkpoint_architecture(folder: Path, config: dict[str, Any]) -> Architecture:
    """The architecture of the checkpoint in `folder` with this gated config.json. SourceError where
    transformers refuses it.
    """
    from transformers import AutoModelForCausalLM

    options = loading_options(folder, config, None, error=SourceError)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(options["config"], trust_remote_code=False)
    return Architecture.of_config(config, list(experts_modules(model)))


def load_checkpoint(folder: Path) -> "PreTrainedModel":
    """The model in `folder` in its stored dtype, on the CPU.

    SourceError if its type is none that is tested; MoeConvertError if there are no safetensors
    files, or if transformers cannot load it.
    """
    check_runnable(folder)
    options = loading_options(folder, read_config(folder), None, error=SourceError)
    try:
        model = model_class(options["config"]).from_pretrained(
            os.fspath(folder), dtype="auto", **options
        )
    except (OSError, ValueError) as e:
        raise MoeConvertError(f"{folder}: transformers cannot load it: {e}") from e
    return model.eval()
