"""Roles of a checkpoint's tensors: one expert's projection, or one projection of all experts."""

from dataclasses import dataclass

EXPERT_MATRICES = ("gate", "up", "down")
"""The three projections of one expert."""


@dataclass(frozen=True)
class ExpertTensor:
    """One projection of one expert: "gate", "up" or "down".

    layer: ordinal among the layers that have experts.
    """

    layer: int
    expert: int
    projection: str


@dataclass(frozen=True)
class FusedTensor:
    """One projection of all experts of a layer, [experts, rows, columns].

    projection: "gate", "up", "down", or "gate_up", which has gate's rows before up's.
    """

    layer: int
    projection: str
