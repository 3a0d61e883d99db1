"""Sizes of experts in memory, by layer."""

from pathlib import Path
from typing import Protocol

from formats.expert import ExpertLayout
from formats.index import Architecture


class SizedExperts(Protocol):
    """Experts of known sizes: a converted folder (`Artifact`), or a recipe for a checkpoint."""

    @property
    def folder(self) -> Path:
        """The folder's name, for error messages."""

    @property
    def architecture(self) -> Architecture:
        """The model's dimensions."""

    def layout(self, layer: int, expert: int) -> ExpertLayout:
        """Return an expert's layout in memory."""


def staging_experts(architecture: Architecture) -> int:
    """Return how many experts the staging area holds: those of one token, at least two."""
    return max(2, architecture.num_experts_per_tok)


def expert_bytes_by_layer(artifact: SizedExperts) -> list[int]:
    """Return the size in memory of each layer's largest expert, in bytes."""
    experts = range(artifact.architecture.num_local_experts)
    layers = range(artifact.architecture.expert_layers)
    return [max(artifact.layout(layer, expert).n_bytes for expert in experts) for layer in layers]


def staging_bytes(artifact: SizedExperts, staging: int) -> int:
    """Return the size of a staging area of `staging` experts, in bytes.

    Buffers have one size, so each expert size of the model has a staging area.
    """
    return staging * sum(set(expert_bytes_by_layer(artifact)))
