"""One token's way through a decoder layer on a GPU: seven launches up to the router's choice,
prepared once.
"""

from collections.abc import Callable
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from formats.packing import Packing, tile_packing_named
from loader.arithmetic.kernels import PackedMatrix
from loader.cuda.decode.token_memory import Sizes, TokenMemory
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import Products, TokenExperts
from loader.decode.weights import LayerWeights

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Dtypes of activations, with the endings of their kernels' names."""
MOST_HEAD_DIM = 256
_HEADS = 2
"""Query heads of one block of the attention kernel (kHeads)."""
_NORM_THREADS, _ATTEND_THREADS, _ROUTE_THREADS = 256, 256, 512


class Launches:
    """The kernels of loader/cuda/kernels that are not products, over one `TokenMemory`."""

    def __init__(self, device: Device, sizes: Sizes, memory: TokenMemory) -> None:
        self._device, self._sizes, self._memory = device, sizes, memory
        self._suffix = SUFFIXES[sizes.dtype]

    def add_norm(
        self, x: Tensor | c_void_p, added: Tensor | None, weight: Tensor, eps: float, total: Tensor
    ) -> Callable[[], None]:
        """total = x + `added`; its norm into `normed` and, quantized, `acts`. x, weight, total
        [hidden] of the dtype, added float32 [hidden].
        """
        memory = self._memory
        args = x, c_void_p() if added is None else added, weight, eps, self._sizes.hidden
        return self._device.prepare(
            f"add_norm_{self._suffix}",
            (1, 1, 1),
            _NORM_THREADS,
            (*args, total, memory.normed, memory.acts),
        )

    def attend(self, keys: c_void_p, values: c_void_p, capacity: c_int64) -> Callable[[], None]:
        """Appends `k` and `v` at `position`, and attends to all positions, which lie in `spans` of
        the cache.
        """
        sizes, memory = self._sizes, self._memory
        group = sizes.heads // sizes.kv_heads
        return self._device.prepare(
            f"attend_{self._suffix}",
            (memory.spans, sizes.kv_heads, -(-group // _HEADS)),
            _ATTEND_THREADS,
            (
                memory.q, memory.k, memory.v, memory.cos, memory.sin, keys, values, capacity, memory.position, group,
                sizes.head_dim, float(sizes.scale), memory.acc, memory.top, memory.total,
            ),
        )  # fmt: skip

    def combine(self) -> Callable[[], None]:
        """The mixed values of all spans, quantized, into `mixed`."""
        sizes, memory = self._sizes, self._memory
        blocks = memory.mixed.shape[1]
        args = (
            memory.acc,
            memory.top,
            memory.total,
            memory.spans,
            sizes.heads,
            sizes.head_dim,
            memory.mixed,
        )
        return self._device.prepare("attend_combine", (-(-blocks // 8), 1, 1), 128, args)

    def route(self, router: Tensor) -> Callable[[], None]:
        """`normed` through router [experts, hidden] and, if there is one, `next_router`: `choice`,
        `weights`.
        """
        sizes, memory = self._sizes, self._memory
        return self._device.prepare(
            f"route_{self._suffix}",
            (1, 1, 1),
            _ROUTE_THREADS,
            (
                memory.normed, router, memory.next_router, sizes.hidden, sizes.experts, sizes.top_k, memory.guesses,
                memory.weights, memory.choice,
            ),
            shared_bytes=16 * sizes.experts,
        )  # fmt: skip


class CudaLayerStep:
    """A layer's weights, all on the device, and its launches. Keeps them alive. ValueError if sizes
    do not fit.
    """

    def __init__(
        self,
        launches: Launches,
        products: Products,
        sizes: Sizes,
        memory: TokenMemory,
        weights: LayerWeights,
        experts: TokenExperts,
        *,
        first: bool,
    ) -> None:
        """first: x is the token's row of the embedding, not what the layer before left."""
        check(sizes, weights)
        attention = weights.attention
        self.weights, self.experts = weights, experts
        self._launches, self._memory = launches, memory
        self.keys, self.values, self.capacity = c_void_p(), c_void_p(), c_int64()
        x, added = (memory.row, None) if first else (memory.residual, memory.sum)
        self._norm = launches.add_norm(
            x, added, weights.attention_norm, weights.attention_eps, memory.x
        )
        self._qkv = products.prepare_linear(
            memory.acts,
            [
                _entry(m, y)
                for m, y in (
                    (attention.q, memory.q),
                    (attention.k, memory.k),
                    (attention.v, memory.v),
                )
            ],
            sizes.hidden,
        )
        self._o = products.prepare_linear(memory.mixed, [_entry(attention.o, memory.o)], sizes.wide)
        norm = weights.experts_norm, weights.experts_eps
        self._experts_norm = launches.add_norm(memory.x, memory.o, *norm, memory.residual)
        self._route = launches.route(weights.router)
        self._steps: tuple[Callable[[], None], ...] = ()

    def prepare_attention(self) -> None:
        """After the number of spans has changed."""
        attend = self._launches.attend(self.keys, self.values, self.capacity)
        combine = self._launches.combine()
        self._steps = (
            self._norm,
            self._qkv,
            attend,
            combine,
            self._o,
            self._experts_norm,
            self._route,
        )

    def begin(self, place: tuple[int, int, int], ahead: tuple[Tensor, int] | None) -> None:
        """Queues all up to the router, over the cache at `place` (`GrowingLayer.place`), and the
        copy of its choice.
        """
        self.keys.value, self.values.value, self.capacity.value = place
        self._memory.next_router.value, self._memory.guesses.value = (
            (None, 0) if ahead is None else (ahead[0].data_ptr(), ahead[1])
        )
        for launch in self._steps:
            launch()
        self._memory.send_choice()


def _entry(matrix: PackedMatrix, y: Tensor) -> tuple[Tensor, Packing, int, Tensor]:
    return matrix.tiles, tile_packing_named(matrix.packing), matrix.rows, y


def fits(sizes: Sizes) -> bool:
    """Whether the kernels take such layers."""
    return (
        sizes.dtype in SUFFIXES
        and sizes.hidden % 4 == 0
        and 0 < sizes.head_dim <= MOST_HEAD_DIM
        and sizes.head_dim % 16 == 0
        and sizes.heads % sizes.kv_heads == 0
        and 0 < sizes.top_k <= sizes.experts
    )


def check(sizes: Sizes, weights: LayerWeights) -> None:
    """ValueError if these are not weights of such a layer."""
    hidden, wide, narrow = sizes.hidden, sizes.wide, sizes.narrow
    for name, rows, columns in (
        ("q", wide, hidden),
        ("k", narrow, hidden),
        ("v", narrow, hidden),
        ("o", hidden, wide),
    ):
        matrix: PackedMatrix = getattr(weights.attention, name)
        need = tile_packing_named(matrix.packing).matrix_bytes(rows, columns)
        if matrix.rows != rows or matrix.tiles.numel() < need or not matrix.tiles.is_contiguous():
            raise ValueError(
                f"{name}: {matrix.rows} rows in {matrix.tiles.numel()} bytes; {rows} take {need}"
            )
    for tensor, shape in (
        (weights.attention_norm, (hidden,)),
        (weights.experts_norm, (hidden,)),
        (weights.router, (sizes.experts, hidden)),
    ):
        if tensor.dtype is not sizes.dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"expected dense {shape} of {sizes.dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
