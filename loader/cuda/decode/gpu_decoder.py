"""The GPU decoder: one token through a whole model, with one wait of the host for each layer."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from loader.arithmetic.backend import Backend
from loader.cuda.decode.cpu_part import CpuPart
from loader.cuda.decode.gpu_layer import CudaLayerStep, Launches
from loader.cuda.decode.output_head import prepare_head
from loader.cuda.decode.token_memory import SPAN, Sizes, TokenMemory
from loader.cuda.device.device import Device
from loader.cuda.experts.cpu_share import CpuShare, Split
from loader.cuda.products.packed_products import Products
from loader.cuda.products.token_experts import TokenExperts
from loader.decode.decoder import Kind, KvLayer
from loader.decode.rotary_table import row_offset_bytes
from loader.decode.weight_checks import check_dense
from loader.decode.weights import ModelWeights
from loader.experts.cache import ExpertSource
from loader.experts.lease import Lease


class CudaDecoder:
    """A model's weights, all on the device, and its prepared launches. Keeps the weights alive.

    It computes in the order of `loader.decode.cpu.CpuDecoder` (docs/numerics.md). One token at a
    time; threads may share it if they use one stream. All experts of a layer have one layout of
    tiles. Raises ValueError if the weights do not fit together.
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
        """share, cpu: as in `CudaDecoderFactory`."""
        self._sizes = sizes
        self._share = share
        self._weights = weights
        self.has_head = weights.head is not None
        vocabulary = len(weights.embedding)
        check_dense("embedding", weights.embedding, (vocabulary, sizes.hidden), sizes.dtype)
        check_dense("norm", weights.norm, (sizes.hidden,), sizes.dtype)
        self._kind: Kind = (sizes.kv_heads, sizes.head_dim, sizes.dtype, device.torch_device)
        memory = TokenMemory(device, sizes, for_cpu=share is not None)
        self._memory = memory
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
            memory.residual, memory.sum, weights.norm, weights.eps, memory.x
        )
        self._head = prepare_head(device, products, sizes, memory, weights.head)
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
        """Decode one token (`Decoder.run`). Experts are requested by rank, layer by layer."""
        with self._lock:
            length = past[0].get_seq_length()
            places = [layer.place(self._kind) for layer in past]
            self._set_token(token, cos, sin, row, length)
            for number, (step, place) in enumerate(zip(self._layers, places, strict=True)):
                ahead = self._router_ahead(experts, number)
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
        memory = self._memory
        sizes = self._sizes
        offset = row_offset_bytes(cos, sin, row, sizes.head_dim, sizes.dtype)
        memory.heads.cos = cos.data_ptr() + offset
        memory.heads.sin = sin.data_ptr() + offset
        memory.heads.position = length
        row_bytes = sizes.hidden * sizes.dtype.itemsize
        memory.row.value = self._weights.embedding.data_ptr() + token * row_bytes
        if memory.set_spans(length // SPAN + 1):
            for step in self._layers:
                step.prepare_attention()

    def _router_ahead(self, experts: ExpertSource, layer: int) -> tuple[Tensor, int] | None:
        """Return `ExpertSource.router_ahead`; None if the model's dtype changed after loading."""
        ahead = experts.router_ahead(layer)
        return ahead if ahead and ahead[0].dtype is self._sizes.dtype else None

    def _add(
        self,
        experts: TokenExperts,
        lease: Lease,
        chosen: Sequence[int],
        meanwhile: Callable[[], None],
    ) -> None:
        """Add the leased experts of `chosen`, by rank, to `sum`.

        Calls `meanwhile` once, when the GPU has work, or before the host waits.
        """
        # The sum is in ascending order of experts. The order of two terms changes no bit
        # (docs/numerics.md), so the first of two to arrive need not wait.
        in_parts = len(chosen) <= 2 and (bool(lease.ready) or not lease.is_complete)
        at_once = lease.is_complete or (in_parts and bool(lease.ready))
        if not at_once:
            meanwhile()
        for number, blobs in enumerate(lease.parts() if in_parts else (lease.all(),)):
            ranked = [(chosen.index(expert), blobs[expert]) for expert in sorted(blobs)]
            experts.add(ranked, first=number == 0)
            if at_once and number == 0:
                meanwhile()


def _nothing() -> None:
    pass
