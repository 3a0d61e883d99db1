"""The protocol of decoders, the same on the CPU and on GPUs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loader.decode.weights import ModelWeights
from loader.experts.cache import ExpertSource

Kind = tuple[int, int, torch.dtype, torch.device]
"""Heads, head width, dtype and device of a layer's keys and values."""


class KvLayer(Protocol):
    """One layer's keys and values of one sequence, in memory with room to spare."""

    def get_seq_length(self) -> int:
        """Return the number of positions."""

    def place(self, kind: Kind) -> tuple[int, int, int]:
        """Return the addresses of keys and values [heads, capacity, width], and the capacity: at
        least one position more than there are. ValueError if the memory is of another kind, or of
        several sequences.
        """

    def show(self, length: int) -> None:
        """Make the first `length` positions the layer's."""


class Decoder(Protocol):
    """Computes one token over the weights that it was made of.

    For each layer: the first half (attention, router), a lease of the chosen experts, the second
    half (experts).
    """

    has_head: bool
    """False if `run` gives the input of the head."""

    def run(
        self,
        token: int,
        cos: Tensor,
        sin: Tensor,
        row: int,
        past: Sequence[KvLayer],
        experts: ExpertSource,
    ) -> Tensor:
        """Return logits [1, 1, rows] of the activations' dtype; without `has_head` the normed
        hidden state [1, 1, hidden].

        token: below the number of embeddings. cos, sin: [1, positions, head_dim]; `row` is the
        token's position in them. past: one for each layer, all of one length; one position longer
        afterwards. Raises the errors of `formats.reading.reader.Load`, and ValueError if a size
        does not fit.
        """


class DecoderFactory(Protocol):
    """Makes decoders for one device."""

    device: torch.device

    def make(self, weights: ModelWeights, experts: ExpertSource) -> Decoder:
        """Return a decoder of these weights. LeaveDecoder, with the reason, if there is none for
        them.
        """
