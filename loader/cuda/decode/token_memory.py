"""What one token leaves on its way through the layers: memory of the GPU, and numbers for launches,
that all share.
"""

import weakref
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.reading.reader import aligned_bytes
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import acts_shape

SPAN = 512
"""Positions of the cache that one block of the attention kernel takes (kSpan)."""


@dataclass(frozen=True)
class Sizes:
    """What the layers of a model have in common."""

    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    scale: float

    @property
    def wide(self) -> int:
        """Values of all query heads."""
        return self.heads * self.head_dim

    @property
    def narrow(self) -> int:
        """Values of all heads of keys, or of values."""
        return self.kv_heads * self.head_dim


class TokenMemory:
    """Buffers between the launches of one token, and the numbers among their arguments that change
    with the token.
    """

    def __init__(self, device: Device, sizes: Sizes, *, for_cpu: bool = False) -> None:
        """for_cpu: the host gets, with the router's choice, all that it needs to compute experts
        itself.
        """
        self._device, self._sizes = device, sizes
        hidden = sizes.hidden
        self.x, self.residual = (self.new(hidden, sizes.dtype) for _ in range(2))
        self.q, self.k, self.v = (
            self.new(n, torch.float32) for n in (sizes.wide, sizes.narrow, sizes.narrow)
        )
        self.o, self.sum = (self.new(hidden, torch.float32) for _ in range(2))
        self.acts, self.mixed = (self.new_acts(n) for n in (hidden, sizes.wide))
        # Side by side, so that one copy brings to the host what it needs.
        ends = list(
            accumulate(
                (hidden * sizes.dtype.itemsize, 4 * (sizes.top_k + sizes.experts), 4 * sizes.top_k)
            )
        )
        there, self._host = self.new(ends[-1], torch.uint8), pinned(device, ends[-1], self)
        self.normed, self.choice, self.weights = self._views(there, ends)
        """What the router sees; its choice by rank, then what the next layer's router guesses; the
        choice's weights.
        """
        self.host_normed, host_choice, self.host_weights = self._views(self._host, ends)
        """After `chosen`, with `for_cpu`."""
        self._numbers = (c_int32 * host_choice.numel()).from_address(host_choice.data_ptr())
        begin, end = (0, ends[-1]) if for_cpu else ends[:2]
        self._copied = self._host[begin:end], there[begin:end]
        self.spans = 0
        self.acc, self.top, self.total = (self.new(0, torch.float32) for _ in range(3))
        """Of the attention kernel: [spans, heads, head_dim] and twice [spans, heads]."""
        self.row, self.cos, self.sin, self.next_router = (
            c_void_p(),
            c_void_p(),
            c_void_p(),
            c_void_p(),
        )
        """Addresses: of the token's row of the embedding, of its rotary embedding, of the router
        that guesses.
        """
        self.position, self.guesses = c_int64(), c_int64()
        self._arrived = device.new_event()

    def new(self, count: int, dtype: torch.dtype) -> Tensor:
        """[count] of `dtype`."""
        return self._device.empty(max(count, 1) * dtype.itemsize).view(dtype)[:count]

    def new_acts(self, columns: int) -> Tensor:
        """uint8 [1, blocks, 80]: one token's quantized activations."""
        shape = acts_shape(1, columns)
        return self._device.empty(prod(shape)).view(shape)

    def _views(self, memory: Tensor, ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        normed, choice, weights = memory[: ends[0]], memory[ends[0] : ends[1]], memory[ends[1] :]
        return normed.view(self._sizes.dtype), choice.view(torch.int32), weights.view(torch.float32)

    def set_spans(self, spans: int) -> bool:
        """Sees to it that the attention kernel has memory for so many spans; whether they are
        others than before: then launches are to be prepared anew.
        """
        if spans == self.spans:
            return False
        if spans * self._sizes.heads > self.top.numel():
            count = 2 * spans * self._sizes.heads
            self.acc, self.top, self.total = (
                self.new(n, torch.float32) for n in (count * self._sizes.head_dim, count, count)
            )
        self.spans = spans
        return True

    def send_choice(self) -> None:
        """Queues the copy of `choice` to the host."""
        stream = self._device.compute_stream()
        self._device.copy(*self._copied, stream)
        self._arrived.record(stream)

    def chosen(self, guesses: int) -> tuple[list[int], list[int]]:
        """Waits for what was sent: the router's choice by rank, and so many guesses."""
        self._arrived.synchronize()
        top_k = self._sizes.top_k
        return self._numbers[:top_k], self._numbers[top_k : top_k + guesses]


def pinned(device: Device, n_bytes: int, owner: object) -> Tensor:
    """uint8 [n_bytes] of host memory, page-locked, where the system allows it, while there is
    `owner`.
    """
    pages = aligned_bytes(-(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    if device.pin(pages):
        weakref.finalize(owner, device.unpin, pages).atexit = False
    return pages[:n_bytes]
