"""Checks that a model can have a KV cache in 8 bits, before its weights are read."""

from collections.abc import Mapping, Sequence
from typing import Any

from formats.errors import RecipeError
from formats.index import Architecture
from loader.decode.kv_blocks import MAX_WIDTH, WIDTH_MULTIPLE
from loader.decode.specs import SPECS


def check_8bit_cache(
    architecture: Architecture, config: Mapping[str, Any], devices: Sequence[Any]
) -> None:
    """Raise RecipeError naming the first property that a KV cache in 8 bits does not support.

    config: fields of config.json. devices: GPUs on which the model would run.
    """
    width = architecture.head_dim
    if architecture.model_type not in SPECS:
        _refuse(f"{architecture.model_type} has no kernel for it; {', '.join(SPECS)} has")
    if devices:
        _refuse("GPUs have no kernel for it, and this model would run on a GPU", cpu=True)
    if config.get("sliding_window") is not None:
        _refuse(f"sliding_window is {config['sliding_window']}; only full attention is supported")
    if width % WIDTH_MULTIPLE or width > MAX_WIDTH:
        _refuse(
            f"head_dim is {width}; it must be a multiple of {WIDTH_MULTIPLE}, at most {MAX_WIDTH}"
        )


def _refuse(cause: str, *, cpu: bool = False) -> None:
    raise RecipeError(
        f"kv_bits: 8 is not available: {cause}",
        "give --device cpu, or --kv-bits 16" if cpu else "give --kv-bits 16",
    )
