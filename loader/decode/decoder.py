"""The protocol of decoders, for the CPU and for GPUs."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loader.decode.weights import ModelWeights
from loader.experts.cache import ExpertSource

MIN_POSITIONS = 256
"""Least capacity of a layer's memory, in positions."""
Kind = tuple[int, int, torch.dtype, torch.device]
"""Heads, head width, dtype and device of a layer's keys and values."""


class KvLayer(Protocol):
    """One layer's keys and values of one sequence, in memory with room to spare.

    is_8bit: True if the memory holds blocks of codes (`loader.decode.kv_blocks`).
    """

    is_8bit: bool

    def get_seq_length(self) -> int:
        """Return the number of positions."""

    def place(self, kind: Kind) -> tuple[int, int, int]:
        """Return the addresses of keys and values [heads, capacity, width], and the capacity.

        The capacity has room for at least one more position. Raises ValueError if the memory is of
        another kind, or of several sequences.
        """

    def show(self, length: int) -> None:
        """Set the number of positions to `length`."""


class Decoder(Protocol):
    """Decodes single tokens over the weights that it was made from.

    For each layer: the first half (attention, router), a lease of the chosen experts, the second
    half (experts).
    """

    has_head: bool
    """True if `run` returns logits; False if it returns the input of the head."""

    def run(
        self,
        token: int,
        cos: Tensor,
        sin: Tensor,
        row: int,
        past: Sequence[KvLayer],
        experts: ExpertSource,
    ) -> Tensor:
        """Return logits [1, 1, rows], or without a head the final hidden state [1, 1, hidden].

        The result has the activations' dtype.

        token: id, less than the number of embeddings. cos, sin: [1, positions, head_dim]; row: the
        token's row in them. past: keys and values of each layer, all of one length, which grows by
        one. Raises ValueError if a size does not fit, and the errors of
        `formats.reading.reader.Load`.
        """


class DecoderFactory(Protocol):
    """Makes decoders for one device."""

    device: torch.device

    def make(self, weights: ModelWeights, experts: ExpertSource) -> Decoder:
        """Return a decoder for these weights. LeaveDecoder with the reason if there is none."""
