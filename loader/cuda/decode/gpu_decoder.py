"""One token's way through a whole model on a GPU: the host waits for each layer's choice of
experts, for no more.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_void_p
from functools import partial

import torch
from torch import Tensor

from formats.packing import tile_packing_named
from loader.arithmetic.backend import Backend
from loader.arithmetic.kernels import PackedMatrix
from loader.cuda.decode.cpu_part import CpuPart
from loader.cuda.decode.gpu_layer import CudaLayerStep, Launches
from loader.cuda.decode.token_memory import SPAN, Sizes, TokenMemory
from loader.cuda.device.device import Device
from loader.cuda.experts.cpu_share import CpuShare, Split
from loader.cuda.products.packed_products import Products, TokenExperts
from loader.decode.decoder import Kind, KvLayer
from loader.decode.weights import ModelWeights
from loader.experts.cache import ExpertSource
from loader.experts.lease import Lease

_HEAD_THREADS, _HEAD_ROWS = 256, 8
"""Threads and rows of one block of linear_bf16."""


class CudaDecoder:
    """A model's weights, all on the device, and its launches, prepared once. Keeps the weights
    alive. ValueError if they do not fit together.

    It computes what `loader.decode.cpu.CpuDecoder` computes, in the same order (docs/numerics.md).
    One token at a time; threads may share it if they use one stream. All experts of a layer have
    one layout of tiles.
    """

    def __init__(
        self,
        device: Device,
        products: Products,
        sizes: Sizes,
        weights: ModelWeights,
        share: CpuShare | None = None,
        cpu: Backend | None = None,
    ) -> None:
        """share: which of the experts the CPU computes, by the backend `cpu`; None: none."""
        self._sizes, self._share, self._weights = sizes, share, weights
        self.has_head = weights.head is not None
        for tensor in (weights.embedding[0], weights.norm):
            if tensor.dtype is not sizes.dtype or tensor.shape != (sizes.hidden,):
                raise ValueError(
                    f"expected {sizes.dtype} of {sizes.hidden}, got {tensor.shape} {tensor.dtype}"
                )
        self._kind: Kind = (sizes.kv_heads, sizes.head_dim, sizes.dtype, device.torch_device)
        memory = self._memory = TokenMemory(device, sizes, for_cpu=share is not None)
        self._cpu = None if share is None or cpu is None else CpuPart(device, memory, cpu)
        launches = Launches(device, sizes, memory)
        layouts = [layer.layouts[0] for layer in weights.layers]
        experts = {
            layout: products.token_experts(layout, memory.acts, memory.weights, memory.sum)
            for layout in set(layouts)
        }
        self._layers = [
            CudaLayerStep(
                launches, products, sizes, memory, layer, experts[layout], first=number == 0
            )
            for number, (layer, layout) in enumerate(zip(weights.layers, layouts, strict=True))
        ]
        self._norm = launches.add_norm(
            memory.residual, memory.sum, self._weights.norm, weights.eps, memory.x
        )
        self._head = _head(device, products, sizes, memory, self._weights.head)
        self._lock = threading.Lock()

    def run(
        self,
        token: int,
        cos: Tensor,
        sin: Tensor,
        row: int,
        past: Sequence[KvLayer],
        experts: ExpertSource,
    ) -> Tensor:
        """As `Decoder.run`. Experts are asked for by rank, in the order of layers."""
        with self._lock:
            length = past[0].get_seq_length()
            places = [layer.place(self._kind) for layer in past]
            self._set_token(token, cos, sin, row, length)
            for number, (step, place) in enumerate(zip(self._layers, places, strict=True)):
                ahead = self._ahead(experts, number)
                step.begin(place, ahead)
                chosen, guesses = self._memory.chosen(ahead[1] if ahead else 0)
                guess = partial(experts.guess, number + 1, guesses) if guesses else _nothing
                with (
                    self._split(number, chosen) as split,
                    experts.lease(number, split.on_gpu) as lease,
                ):
                    self._add(step.experts, lease, chosen, guess)
                    if split.on_cpu and self._cpu:
                        self._cpu.add(split.on_cpu, self._weights.layers[number].layouts, chosen)
            self._norm()
            result = self._head()
            for layer in past:
                layer.show(length + 1)
            return result

    def _split(self, layer: int, chosen: list[int]) -> AbstractContextManager[Split]:
        if self._share is None or self._cpu is None:
            return nullcontext(Split(chosen, {}))
        return self._share.split(layer, chosen)

    def _set_token(self, token: int, cos: Tensor, sin: Tensor, row: int, length: int) -> None:
        memory, sizes, embedding = self._memory, self._sizes, self._weights.embedding
        if not (
            cos.dtype is sin.dtype is sizes.dtype
            and cos.shape == sin.shape
            and cos.shape[-1] == sizes.head_dim
        ):
            raise ValueError(
                f"rotary embedding of {sizes.dtype} [{sizes.head_dim}]: got {cos.dtype} {cos.shape}"
            )
        offset = row * sizes.head_dim * sizes.dtype.itemsize
        memory.cos.value, memory.sin.value = cos.data_ptr() + offset, sin.data_ptr() + offset
        memory.row.value = embedding.data_ptr() + token * sizes.hidden * sizes.dtype.itemsize
        memory.position.value = length
        if memory.set_spans(length // SPAN + 1):
            for step in self._layers:
                step.prepare_attention()

    def _ahead(self, experts: ExpertSource, layer: int) -> tuple[Tensor, int] | None:
        """As `ExpertSource.router_ahead`, None where the model has another dtype than when it was
        loaded.
        """
        ahead = experts.router_ahead(layer)
        return ahead if ahead and ahead[0].dtype is self._sizes.dtype else None

    def _add(
        self,
        experts: TokenExperts,
        lease: Lease,
        chosen: Sequence[int],
        meanwhile: Callable[[], None],
    ) -> None:
        """The leased ones of the chosen experts, by rank, into `sum`; `meanwhile` is called once
        the GPU has something to do, or has to wait.
        """
        # In ascending order; of two terms the order changes no bit (docs/numerics.md), so that one
        # need not wait.
        in_parts = len(chosen) <= 2 and (bool(lease.ready) or not lease.is_complete)
        at_once = lease.is_complete or (in_parts and bool(lease.ready))
        if not at_once:
            meanwhile()
        for place, blobs in enumerate(lease.parts() if in_parts else (lease.all(),)):
            experts.add(
                [(chosen.index(expert), blobs[expert]) for expert in sorted(blobs)],
                first=place == 0,
            )
            if at_once and place == 0:
                meanwhile()


def _head(
    device: Device,
    products: Products,
    sizes: Sizes,
    memory: TokenMemory,
    head: Tensor | PackedMatrix | None,
) -> Callable[[], Tensor]:
    """What gives a new [1, 1, rows] of the dtype from `normed` and `acts`; without a head the
    normed [1, 1, hidden].
    """
    if isinstance(head, Tensor):
        return _bf16_head(device, sizes, memory, head)
    result = memory.normed
    launch = _nothing
    if head is not None:
        result = memory.new(head.rows, torch.float32)
        entry = head.tiles, tile_packing_named(head.packing), head.rows, result
        launch = products.prepare_linear(memory.acts, [entry], sizes.hidden)

    def run() -> Tensor:
        launch()
        return result.to(sizes.dtype, copy=True).view(1, 1, -1)

    return run


def _bf16_head(
    device: Device, sizes: Sizes, memory: TokenMemory, head: Tensor
) -> Callable[[], Tensor]:
    if not head.dtype is sizes.dtype is torch.bfloat16 or head.shape[1:] != (sizes.hidden,):
        raise ValueError(
            f"head of bfloat16 [rows, {sizes.hidden}] for {sizes.dtype}: got {head.shape} {head.dtype}"
        )
    rows, place = len(head), c_void_p()
    args = head, memory.normed, rows, sizes.hidden, place
    launch = device.prepare("linear_bf16", (-(-rows // _HEAD_ROWS), 1, 1), _HEAD_THREADS, args)

    def run() -> Tensor:
        out = torch.empty((1, 1, rows), dtype=sizes.dtype, device=device.torch_device)
        place.value = out.data_ptr()
        launch()
        return out

    return run


def _nothing() -> None:
    pass
