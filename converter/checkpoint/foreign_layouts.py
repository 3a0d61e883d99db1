"""Tensor names of other programs: wrappers' prefixes, a missing prefix, mlx-lm's stacks."""

import re

from converter.checkpoint.model_shape import ModelShape
from converter.checkpoint.names import ExpertTensor, FusedTensor

# torch.compile, FSDP and activation checkpointing insert the wrapper's name before the module's.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# DataParallel and DeepSpeed write "module.", PEFT "base_model.model."; these may be nested.
_OUTER = re.compile(r"^(?:module\.|base_model\.model\.)+")
_NO_MODEL = re.compile(r"^(?:layers\.\d+|embed_tokens|norm)\.")
# mlx-lm, models/mixtral.py: one tensor [experts, rows, columns] per projection.
_SWITCH = re.compile(
    r"model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.switch_mlp\.(gate|up|down)_proj\.weight"
)
# Some programs write a fused parameter as if it were a module.
_FUSED_MODULE = re.compile(r"(.+\.experts\.(?:gate_up_proj|down_proj))\.weight")


def plain_name(name: str) -> str:
    """Return `name` without wrappers' prefixes, and with `model.` where that is missing."""
    name = _OUTER.sub("", _WRAPPERS.sub("", name))
    if name == "model.lm_head.weight":
        return "lm_head.weight"
    return f"model.{name}" if _NO_MODEL.match(name) else name


def foreign_role(name: str, shape: ModelShape) -> ExpertTensor | FusedTensor | str | None:
    """Return `shape.role` of a tensor name in any of these layouts."""
    name = plain_name(name)
    if match := _SWITCH.fullmatch(name):
        layer = shape.experts_layer(f"model.layers.{match[1]}.mlp.experts")
        return name if layer is None else FusedTensor(layer, match[2])
    if match := _FUSED_MODULE.fullmatch(name):
        name = match[1]
    return shape.role(name)
