"""The one place that knows Mixtral's tensor names: w1 is gate, w3 is up, w2 is down."""

import re
from dataclasses import dataclass

_PROJECTION = {"w1": "gate", "w2": "down", "w3": "up"}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w[123])\.weight")
_FUSED = re.compile(r"model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.gate\.weight")
# Old checkpoints store this buffer, in each layer or once; transformers computes it.
_IGNORED = re.compile(r"rotary_emb\.inv_freq")


@dataclass(frozen=True)
class ExpertTensor:
    """One expert's projection: "gate", "up" or "down"."""

    layer: int
    expert: int
    projection: str


@dataclass(frozen=True)
class FusedTensor:
    """One projection of all experts of a layer, [experts, rows, columns]: "gate", "up", "down", or "gate_up", which has
    gate's rows before up's."""

    layer: int
    projection: str


def role(name: str) -> ExpertTensor | FusedTensor | str | None:
    """What a source tensor is: an expert's, all experts', the trunk's (its name there); None for what is not needed."""
    if match := _EXPERT.fullmatch(name):
        return ExpertTensor(int(match[1]), int(match[2]), _PROJECTION[match[3]])
    if match := _FUSED.fullmatch(name):
        return FusedTensor(int(match[1]), match[2].removesuffix("_proj"))
    if _IGNORED.search(name):
        return None
    if match := _ROUTER.fullmatch(name):
        return f"{match[1]}.mlp.gate.weight"
    return name
