"""Memory of one token on its way through the layers, which all layers share."""

import weakref
from ctypes import c_int32, c_void_p
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from formats import ALIGNMENT_BYTES
from formats.reading.reader import aligned_bytes
from loader.cuda.decode.argument_structures import Guess, SpanSums, TokenHeads
from loader.cuda.device.device import Device
from loader.cuda.products.kernel_layouts import acts_shape

SPAN = 512
"""Positions of the KV cache that one block of the attention kernel computes (kSpan)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that all layers of a model share.

    dtype: of the activations. heads, kv_heads: number of heads of queries, and of keys and values.
    scale: of the attention scores.
    """

    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    scale: float

    @property
    def q_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all heads of keys, or of values."""
        return self.kv_heads * self.head_dim


class TokenMemory:
    """Buffers between the launches of one token, and arguments that change with the token.

    All buffers are on the GPU, except those whose name begins with `host`.
    """

    def __init__(self, device: Device, sizes: Sizes, *, for_cpu: bool = False) -> None:
        """for_cpu: the copy of the router's choice includes all that the CPU needs for experts."""
        self._device = device
        self._sizes = sizes
        hidden = sizes.hidden
        self.x = self.new(hidden, sizes.dtype)
        self.residual = self.new(hidden, sizes.dtype)
        self.q = self.new(sizes.q_width, torch.float32)
        self.k = self.new(sizes.kv_width, torch.float32)
        self.v = self.new(sizes.kv_width, torch.float32)
        self.o = self.new(hidden, torch.float32)
        self.sum = self.new(hidden, torch.float32)
        """Sum of the experts' results."""
        self.acts = self.new_acts(hidden)
        """`normed`, quantized."""
        self.mixed = self.new_acts(sizes.q_width)
        """Attention's result, the input of o, quantized."""
        # Side by side, so that one copy brings all of them to the host.
        normed_bytes = hidden * sizes.dtype.itemsize
        choice_bytes = 4 * (sizes.top_k + sizes.experts)
        ends = list(accumulate((normed_bytes, choice_bytes, 4 * sizes.top_k)))
        gpu = self.new(ends[-1], torch.uint8)
        self._host = pinned(device, ends[-1], self)
        self.normed, self.choice, self.weights = self._views(gpu, ends)
        """The router's input [hidden]; its choice by rank, int32 [top_k], then guesses for the next
        layer, int32 [experts]; the weights of the choice, float32 [top_k].
        """
        self.host_normed, host_choice, self.host_weights = self._views(self._host, ends)
        """Copies on the host: valid after `chosen`, and with `for_cpu` only."""
        self._numbers = (c_int32 * host_choice.numel()).from_address(host_choice.data_ptr())
        begin, end = (0, ends[-1]) if for_cpu else ends[:2]
        self._copied = self._host[begin:end], gpu[begin:end]
        self.spans = 0
        """Spans of the KV cache, that of the present token included."""
        self.acc = self.new(0, torch.float32)
        self.top = self.new(0, torch.float32)
        self.total = self.new(0, torch.float32)
        """Results of the attention kernel: [spans, heads, head_dim] and twice [spans, heads]."""
        self.row = c_void_p()
        """Address of the token's row of the embedding."""
        self.heads = TokenHeads(
            q=self.q.data_ptr(), k=self.k.data_ptr(), v=self.v.data_ptr(), position=0
        )
        self.guess = Guess()
        self._arrived = device.new_event()

    def new(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory of the GPU, [count] of `dtype`."""
        return self._device.empty(max(count, 1) * dtype.itemsize).view(dtype)[:count]

    def new_acts(self, columns: int) -> Tensor:
        """Return memory for one token's acts, uint8 [1, blocks of 64 columns, 80]."""
        shape = acts_shape(1, columns)
        return self._device.empty(prod(shape)).view(shape)

    def _views(self, memory: Tensor, ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        normed = memory[: ends[0]].view(self._sizes.dtype)
        choice = memory[ends[0] : ends[1]].view(torch.int32)
        weights = memory[ends[1] :].view(torch.float32)
        return normed, choice, weights

    def set_spans(self, spans: int) -> bool:
        """Make room for `spans` spans. True if the number changed: prepare attention again."""
        if spans == self.spans:
            return False
        if spans * self._sizes.heads > self.top.numel():
            count = 2 * spans * self._sizes.heads
            self.acc = self.new(count * self._sizes.head_dim, torch.float32)
            self.top = self.new(count, torch.float32)
            self.total = self.new(count, torch.float32)
        self.spans = spans
        return True

    def span_sums(self) -> SpanSums:
        """Return the addresses of `acc`, `top` and `total`; a change of `set_spans` ends them."""
        return SpanSums(self.acc.data_ptr(), self.top.data_ptr(), self.total.data_ptr())

    def send_choice(self) -> None:
        """Queue the copy of `choice` to the host, and with `for_cpu` of its neighbours."""
        stream = self._device.compute_stream()
        self._device.copy(*self._copied, stream)
        self._arrived.record(stream)

    def chosen(self, guesses: int) -> tuple[list[int], list[int]]:
        """Wait for the copy; return the router's choice by rank, and `guesses` guessed experts."""
        self._arrived.synchronize()
        top_k = self._sizes.top_k
        return self._numbers[:top_k], self._numbers[top_k : top_k + guesses]


def pinned(device: Device, n_bytes: int, owner: object) -> Tensor:
    """Return host memory, uint8 [n_bytes], page-locked while `owner` lives.

    It is pageable if the system refuses to lock it.
    """
    pages = aligned_bytes(-(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    if device.pin(pages):
        weakref.finalize(owner, device.unpin, pages).atexit = False
    return pages[:n_bytes]
