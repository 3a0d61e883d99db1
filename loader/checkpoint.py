"""An ordinary checkpoint as transformers loads it, without pickles and without code from its folder: for comparison."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from formats import INDEX_NAME
from formats.checkpoint_config import WEIGHTS, read_config
from formats.errors import MoeConvertError, SourceError
from loader.configuration import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds what moe-convert wrote, or at least its index."""
    return (folder / INDEX_NAME).exists()


def load_checkpoint(folder: Path) -> "PreTrainedModel":
    """The Mixtral in `folder` in its stored dtype, on the CPU.

    SourceError if it is another model; MoeConvertError if there are no safetensors files, or if transformers cannot
    load it.
    """
    from transformers import MixtralForCausalLM

    if not folder.is_dir():
        raise MoeConvertError(f"{folder} is not a folder", "name a converted folder, or a folder with a checkpoint")
    if not any((folder / name).exists() for name in WEIGHTS):
        raise MoeConvertError(
            f"{folder}: neither {INDEX_NAME} nor {' nor '.join(WEIGHTS)}",
            "complete the conversion, or save the checkpoint as safetensors; pickles are never read",
        )
    options = loading_options(folder, read_config(folder), None, error=SourceError)
    try:
        model = MixtralForCausalLM.from_pretrained(os.fspath(folder), dtype="auto", **options)
    except (OSError, ValueError) as e:
        raise MoeConvertError(f"{folder}: transformers cannot load it: {e}") from e
    return model.eval()
