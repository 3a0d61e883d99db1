"""One token in one decoder layer on a GPU: seven prepared launches up to the router's choice."""

from collections.abc import Callable
from ctypes import c_void_p

import torch
from torch import Tensor

from formats.packing import tile_packing_named
from loader.arithmetic.kernels import PackedMatrix
from loader.cuda.decode.argument_structures import HeadShape, KvPlace
from loader.cuda.decode.token_memory import Sizes, TokenMemory
from loader.cuda.device.device import Device
from loader.cuda.products.packed_products import Products
from loader.cuda.products.structures import LinearMatrix
from loader.cuda.products.token_experts import TokenExperts
from loader.decode.weight_checks import check_dense, check_matrix
from loader.decode.weights import LayerWeights

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Suffix of kernel names by dtype of the activations."""
MAX_HEAD_DIM = 256
_HEADS = 2
"""Query heads of one block of the attention kernel (kHeads)."""
_NORM_THREADS, _ATTEND_THREADS, _ROUTE_THREADS = 256, 256, 512
_COMBINE_THREADS = 128


class Launches:
    """Prepares the kernels of a layer that are not products, over one `TokenMemory`."""

    def __init__(self, device: Device, sizes: Sizes, memory: TokenMemory) -> None:
        self._device = device
        self._sizes = sizes
        self._memory = memory
        self._suffix = SUFFIXES[sizes.dtype]

    def add_norm(
        self, x: Tensor | c_void_p, added: Tensor | None, weight: Tensor, eps: float, total: Tensor
    ) -> Callable[[], None]:
        """Prepare total = x + added, and its norm into `normed` and, quantized, into `acts`.

        x, weight, total: [hidden] of the activations' dtype. added: float32 [hidden]; None: 0.
        """
        memory = self._memory
        return self._device.prepare(
            f"add_norm_{self._suffix}",
            (1, 1, 1),
            _NORM_THREADS,
            (
                x,
                c_void_p() if added is None else added,
                weight,
                eps,
                self._sizes.hidden,
                total,
                memory.normed,
                memory.acts,
            ),
        )

    def attend(self, place: KvPlace) -> Callable[[], None]:
        """Prepare attention: it appends `k` and `v` to the KV cache and attends to all positions.

        place: the layer's KV cache, with as many positions as the memory's `spans`.
        """
        sizes = self._sizes
        memory = self._memory
        group = sizes.heads // sizes.kv_heads
        shape = HeadShape(group=group, dim=sizes.head_dim, scale=float(sizes.scale))
        return self._device.prepare(
            f"attend_{self._suffix}",
            (memory.spans, sizes.kv_heads, -(-group // _HEADS)),
            _ATTEND_THREADS,
            (memory.heads, place, shape, memory.span_sums()),
        )

    def combine(self) -> Callable[[], None]:
        """Prepare the sum of all spans, quantized, into `mixed`."""
        sizes = self._sizes
        memory = self._memory
        blocks = memory.mixed.shape[1]
        return self._device.prepare(
            "attend_combine",
            (-(-blocks // 8), 1, 1),
            _COMBINE_THREADS,
            (memory.span_sums(), memory.spans, sizes.heads, sizes.head_dim, memory.mixed),
        )

    def route(self, router: Tensor) -> Callable[[], None]:
        """Prepare the router's choice and its weights, from `normed`, and the guess of `guess`.

        router: [experts, hidden].
        """
        sizes = self._sizes
        memory = self._memory
        return self._device.prepare(
            f"route_{self._suffix}",
            (1, 1, 1),
            _ROUTE_THREADS,
            (
                memory.normed,
                router,
                memory.guess,
                sizes.hidden,
                sizes.experts,
                sizes.top_k,
                memory.weights,
                memory.choice,
            ),
            shared_bytes=16 * sizes.experts,
        )


class CudaLayerStep:
    """A layer's weights, all on the device, and its launches. Keeps the weights alive.

    experts: the launches of the layer's experts. Raises ValueError if sizes do not fit together.
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
        """first: the input is the token's row of the embedding, not the previous layer's output."""
        check(sizes, weights)
        self.weights = weights
        self.experts = experts
        self._launches = launches
        self._memory = memory
        self._place = KvPlace()
        attention = weights.attention
        x = memory.row if first else memory.residual
        added = None if first else memory.sum
        self._norm = launches.add_norm(
            x, added, weights.attention_norm, weights.attention_eps, memory.x
        )
        qkv = [
            linear_matrix(attention.q, memory.q),
            linear_matrix(attention.k, memory.k),
            linear_matrix(attention.v, memory.v),
        ]
        self._qkv = products.prepare_linear(memory.acts, qkv, sizes.hidden)
        o = [linear_matrix(attention.o, memory.o)]
        self._o = products.prepare_linear(memory.mixed, o, sizes.q_width)
        self._experts_norm = launches.add_norm(
            memory.x, memory.o, weights.experts_norm, weights.experts_eps, memory.residual
        )
        self._route = launches.route(weights.router)
        self._steps: tuple[Callable[[], None], ...] = ()

    def prepare_attention(self) -> None:
        """Prepare the launches that depend on the number of spans, after it has changed."""
        self._steps = (
            self._norm,
            self._qkv,
            self._launches.attend(self._place),
            self._launches.combine(),
            self._o,
            self._experts_norm,
            self._route,
        )

    def begin(self, place: tuple[int, int, int], ahead: tuple[Tensor, int] | None) -> None:
        """Queue the layer up to the router, and the copy of its choice to the host.

        place: the KV cache (`KvLayer.place`). ahead: the next layer's router, and how many of its
        experts to guess.
        """
        self._place.set(place)
        self._memory.guess.set(ahead)
        for launch in self._steps:
            launch()
        self._memory.send_choice()


def linear_matrix(matrix: PackedMatrix, y: Tensor) -> LinearMatrix:
    """Return the matrix for `Products.prepare_linear`, with its result `y`, float32 [rows]."""
    return LinearMatrix(matrix.tiles, tile_packing_named(matrix.packing), matrix.rows, y)


def fits(sizes: Sizes) -> bool:
    """True if the kernels support layers of these sizes."""
    return (
        sizes.dtype in SUFFIXES
        and sizes.hidden % 4 == 0
        and 0 < sizes.head_dim <= MAX_HEAD_DIM
        and sizes.head_dim % 16 == 0
        and sizes.heads % sizes.kv_heads == 0
        and 0 < sizes.top_k <= sizes.experts
    )


def check(sizes: Sizes, weights: LayerWeights) -> None:
    """Raise ValueError unless the weights have these sizes."""
    attention = weights.attention
    check_matrix("q", attention.q, sizes.hidden, sizes.q_width)
    check_matrix("k", attention.k, sizes.hidden, sizes.kv_width)
    check_matrix("v", attention.v, sizes.hidden, sizes.kv_width)
    check_matrix("o", attention.o, sizes.q_width, sizes.hidden)
    check_dense("attention norm", weights.attention_norm, (sizes.hidden,), sizes.dtype)
    check_dense("experts norm", weights.experts_norm, (sizes.hidden,), sizes.dtype)
    check_dense("router", weights.router, (sizes.experts, sizes.hidden), sizes.dtype)
