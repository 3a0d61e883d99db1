"""The error of stored tensors that the model does not have, with its likely cause."""

import re

from converter.checkpoint.foreign_layouts import plain_name
from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.weight import Weight
from formats.config.model_types import MODEL_TYPES
from formats.errors import SourceError

_MERGE = "merge the adapter into its base model first: peft's merge_and_unload"
_ORIGINAL = "the weights are quantized; use the checkpoint that they were made from"
_HINTS = {
    "lora_": _MERGE,
    ".base_layer.": _MERGE,
    ".scales": _ORIGINAL,
    ".qweight": _ORIGINAL,
}
"""Part of a tensor's name -> hint."""
_EXPERT = re.compile(r"\.experts\.([0-9]{1,9})\.")
_SHOWN = 4


def surplus_error(where: str, surplus: list[Weight], shape: ModelShape) -> SourceError:
    """Return the error of `surplus` tensors in a checkpoint of this shape.

    where: the checkpoint, for the message.
    """
    first = min(surplus, key=lambda weight: weight.name)
    for field, expected, stored in _counts(surplus, shape):
        if stored > expected:
            return SourceError(
                f"{where}: {field} in config.json is {expected}, the tensors are of {stored}:"
                f" {first.name} in {first.shard}",
                f"if the shards are right, set {field} to {stored} in config.json",
            )
    names = sorted(weight.name for weight in surplus)
    hint = "remove tensors outside the language model, such as a value or reward head"
    for part, hint_for_part in _HINTS.items():
        if any(part in name for name in names):
            hint = hint_for_part
            break
    return SourceError(
        f"{where}: {len(names)} tensors do not belong to the model: {', '.join(names[:_SHOWN])}",
        hint,
    )


def _counts(surplus: list[Weight], shape: ModelShape) -> list[tuple[str, int, int]]:
    """Return (config.json's field, its number, the number in the tensors) of layers and experts."""
    names = [plain_name(weight.name) for weight in surplus]
    layers = [layer for name in names if (layer := shape.decoder_layer(name)) is not None]
    experts = [int(match[1]) for name in names if (match := _EXPERT.search(name))]
    experts_field = MODEL_TYPES[shape.model_type].experts
    return [
        ("num_hidden_layers", len(shape.decoder_layers), 1 + max(layers, default=-1)),
        (experts_field, shape.experts[0].experts, 1 + max(experts, default=-1)),
    ]
