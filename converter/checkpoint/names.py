"""What a tensor of a checkpoint is: an expert's projection, or a projection of all experts of a
layer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertTensor:
    """One expert's projection: "gate", "up" or "down". layer: its place among the layers that have
    experts.
    """

    layer: int
    expert: int
    projection: str


@dataclass(frozen=True)
class FusedTensor:
    """One projection of all experts of a layer, [experts, rows, columns]: "gate", "up", "down", or
    "gate_up", which has gate's rows before up's.
    """

    layer: int
    projection: str
