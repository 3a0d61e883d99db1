"""An ordinary checkpoint as transformers loads it, without pickles and without code from its folder: for comparison."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from formats import INDEX_NAME
from formats.checkpoint_config import WEIGHTS, read_config
from formats.errors import MoeConvertError, SourceError
from formats.paths import read_small
from formats.strict_json import parse
from formats.unconverted import check_finished
from loader.configuration import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds what moe-convert wrote, or at least its index."""
    return (folder / INDEX_NAME).exists()


def check_runnable(folder: Path) -> None:
    """MoeConvertError unless `folder` has a converted model or the weights of a checkpoint; reads none of them."""
    if is_converted(folder):
        return
    if not folder.is_dir():
        raise MoeConvertError(f"{folder} is not a folder", "name a converted folder, or a folder with a checkpoint")
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


def load_checkpoint(folder: Path) -> "PreTrainedModel":
    """The Mixtral in `folder` in its stored dtype, on the CPU.

    SourceError if it is another model; MoeConvertError if there are no safetensors files, or if transformers cannot
    load it.
    """
    from transformers import MixtralForCausalLM

    check_runnable(folder)
    options = loading_options(folder, read_config(folder), None, error=SourceError)
    try:
        model = MixtralForCausalLM.from_pretrained(os.fspath(folder), dtype="auto", **options)
    except (OSError, ValueError) as e:
        raise MoeConvertError(f"{folder}: transformers cannot load it: {e}") from e
    return model.eval()
