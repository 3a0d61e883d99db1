"""The CPU decoder: one native call for a token whose experts are all in RAM.

Each layer without known addresses of its experts needs one more call.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import addressof, byref, c_char, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from formats.native.abi import Status
from loader.arithmetic import kernels
from loader.arithmetic.backend import Backend
from loader.arithmetic.expert_table import ExpertTable
from loader.arithmetic.native_library import Model, Token, library
from loader.arithmetic.torch_threads import torch_threads_for
from loader.decode.decoder import Kind, KvLayer
from loader.decode.native_structures import check_model, head_structure, layer_structure
from loader.decode.path_counters import LeaveDecoder, Reason
from loader.decode.rotary_table import row_offset_bytes
from loader.decode.weights import ModelWeights
from loader.experts.cache import ExpertSource
from loader.experts.lease import Lease
from loader.experts.prefetch import in_order, ranked
from loader.lifetime.copies import Derived

_HEAD_WIDTH_MULTIPLE = 16
_WEIGHTS_DEVICE = torch.device("cpu")


class CpuDecoderFactory:
    """Makes `CpuDecoder`s.

    backend: computes layers whose experts have several layouts, or plain rows.
    """

    device = _WEIGHTS_DEVICE

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def make(self, weights: ModelWeights, experts: ExpertSource) -> "CpuDecoder":
        """Make a decoder (`DecoderFactory.make`)."""
        if weights.dtype not in kernels.DTYPES:
            raise LeaveDecoder(Reason.WEIGHTS, f"activations of {weights.dtype} on the CPU")
        for number, layer in enumerate(weights.layers):
            if layer.head_dim % _HEAD_WIDTH_MULTIPLE:
                raise LeaveDecoder(Reason.WEIGHTS, f"layer {number} has heads of {layer.head_dim}")
        return CpuDecoder(weights, experts, self._backend)


class CpuDecoder(Derived):
    """Decodes tokens over a model's weights, which it checks once and keeps alive.

    The native call runs through the layers until one chooses an expert whose address is unknown.
    Layers with a slot for each expert remember all addresses. Addresses in other layers come from a
    lease and are valid for one token. Raises ValueError if the weights' sizes do not fit together.
    """

    def __init__(self, weights: ModelWeights, experts: ExpertSource, backend: Backend) -> None:
        check_model(weights)
        self._weights, self._backend = weights, backend
        self.has_head = weights.head is not None
        hidden, layers = weights.hidden, weights.layers
        self._head = head_structure(weights)
        self._wide = self._head.rows if self.has_head else hidden
        self._structures = [layer_structure(layer, hidden, weights.dtype) for layer in layers]
        self._layers = (c_void_p * len(layers))(*map(addressof, self._structures))
        self._layouts = [layer.layout for layer in layers]
        self._experts = max(layer.experts for layer in layers)
        self._top_k = max(layer.top_k for layer in layers)
        self._is_resident = [
            layout is not None and experts.is_resident(number)
            for number, layout in enumerate(self._layouts)
        ]
        self._expert_bytes = [_expert_bytes(layout) for layout in self._layouts]
        self._kinds: list[Kind] = [
            (
                layer.attention.k.rows // layer.head_dim,
                layer.head_dim,
                weights.dtype,
                _WEIGHTS_DEVICE,
            )
            for layer in layers
        ]
        self._held: dict[tuple[int, int], Tensor] = {}
        self._blobs = (c_void_p * (len(layers) * self._experts))()
        """Addresses of `_held`. They never change: another thread may be reading the bytes."""
        self._model = Model(
            layers=addressof(self._layers),
            embedding=weights.embedding.data_ptr(),
            norm=weights.norm.data_ptr(),
            vocabulary=len(weights.embedding),
            head=self._head,
            eps=weights.eps,
            count=len(layers),
            experts=self._experts,
            top_k=self._top_k,
        )
        self._room = c_char * (3 * hidden * weights.dtype.itemsize)
        self._pointers = c_void_p * len(layers)
        self._sizes = c_int64 * len(layers)
        self._index = c_int64 * (len(layers) * self._top_k)
        self._scores = c_float * (len(layers) * self._top_k)
        self._run = library().moe_token_step

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
        length = past[0].get_seq_length()
        keys, values, capacity = self._pointers(), self._pointers(), self._sizes()
        for number, (layer, kind) in enumerate(zip(past, self._kinds, strict=True)):
            keys[number], values[number], capacity[number] = layer.place(kind)
        offset = row_offset_bytes(
            cos, sin, row, self._weights.layers[0].head_dim, self._weights.dtype
        )
        index, scores, room = self._index(), self._scores(), self._room()
        blobs = type(self._blobs).from_buffer_copy(self._blobs)
        # On the CPU, whatever torch's default device is: native code writes there.
        out = torch.empty((1, 1, self._wide), dtype=self._weights.dtype, device="cpu")
        state = Token(
            id=token,
            cos=cos.data_ptr() + offset,
            sin=sin.data_ptr() + offset,
            keys=addressof(keys),
            values=addressof(values),
            capacity=addressof(capacity),
            length=length,
            blobs=addressof(blobs),
            room=addressof(room),
            index=addressof(index),
            weights=addressof(scores),
            out=out.data_ptr(),
            kv_format=int(past[0].is_8bit),  # MOE_KV_PLAIN, MOE_KV_8BIT
        )
        counted = 0
        error = self._run(byref(self._model), byref(state))
        # Guesses and partial layers use torch, whose threads would spin on cores that the native
        # pool needs.
        with torch_threads_for(1) if error == Status.MISSING else nullcontext():
            while error == Status.MISSING:
                number = state.halves_done // 2
                self._count_hits(experts, index, counted, number)
                counted = number + 1
                chosen = self._chosen(index, number)
                with experts.lease(number, chosen) as lease:
                    self._guess(experts, number, room)
                    if self._is_resident[number]:
                        self._hold(lease, number, blobs)
                    elif self._layouts[number] is None:
                        self._add_by_backend(lease, number, index, scores, room)
                        state.halves_done += 1
                    elif lease.is_complete or len(chosen) > 2:
                        self._place(lease.all(), number, blobs)
                    else:
                        self._add_in_parts(lease, number, index, scores, room)
                        state.halves_done += 1
                    error = self._run(byref(self._model), byref(state))
        if error:
            raise ValueError(f"native model: error {error} at position {length}, token {token}")
        self._count_hits(experts, index, counted, len(past))
        for layer in past:
            layer.show(length + 1)
        return out

    def _chosen(self, index: Any, number: int) -> list[int]:
        begin = number * self._top_k
        chosen: list[int] = index[begin : begin + self._weights.layers[number].top_k]
        return chosen

    def _count_hits(self, experts: ExpertSource, index: Any, begin: int, end: int) -> None:
        """Count hits of layers [begin, end), which needed no lease."""
        for number in range(begin, end):
            experts.used_again(number, self._weights.layers[number].top_k)

    def _guess(self, experts: ExpertSource, number: int, room: Any) -> None:
        """Prefetch the experts that the next layer will probably choose."""
        ahead = experts.router_ahead(number)
        if ahead is None:
            return
        router, guesses = ahead
        experts.guess(number + 1, in_order(ranked(router, self._normed(room)[None], guesses)))

    def _hold(self, lease: Lease, number: int, blobs: Any) -> None:
        """Remember the addresses of a lease's experts for this token and all later ones."""
        leased = lease.all()
        self._place(leased, number, blobs)
        new = {e: blob for e, blob in leased.items() if (number, e) not in self._held}
        self._place(new, number, self._blobs)
        for expert, blob in leased.items():
            self._held.setdefault((number, expert), blob)

    def _place(self, leased: dict[int, Tensor], number: int, blobs: Any) -> None:
        need = self._expert_bytes[number]
        for expert, blob in leased.items():
            if blob.numel() < need or not blob.is_contiguous():
                raise ValueError(
                    f"layer {number}, expert {expert}: {blob.numel()} bytes, {need} needed"
                )
            blobs[number * self._experts + expert] = blob.data_ptr()

    def _add_by_backend(
        self, lease: Lease, number: int, index: Any, scores: Any, room: Any
    ) -> None:
        """Compute a layer's experts with the backend: they have several layouts, or plain rows."""
        chosen, weights = self._routing(number, index, scores)
        total = torch.zeros((1, self._weights.hidden))
        inputs = self._normed(room).float()[None]
        self._backend.experts(
            lease.all(), self._weights.layers[number].layouts, inputs, chosen, weights, total
        )
        self._set_output(total, room)

    def _add_in_parts(self, lease: Lease, number: int, index: Any, scores: Any, room: Any) -> None:
        """Compute a layer's two experts as they arrive.

        The order of two terms changes no bit of their sum (docs/numerics.md).
        """
        layer, structure = self._weights.layers[number], self._structures[number]
        layout = layer.layouts[0]
        names = layout.gate_up.name, layout.down.name
        table = ExpertTable(layer.experts, self._weights.hidden, structure.intermediate, *names)
        chosen, weights = self._routing(number, index, scores)
        inputs = self._normed(room).float()[None]
        total = torch.zeros_like(inputs)
        for blobs in lease.parts():
            for expert, blob in blobs.items():
                table.set(expert, blob)
            table.run(inputs, chosen, weights, total, partial=True)
            for expert in blobs:
                table.set(expert, None)
        self._set_output(total, room)

    def _routing(self, number: int, index: Any, scores: Any) -> tuple[Tensor, Tensor]:
        """Return the router's choice int64 [1, top_k] and weights float32 [1, top_k], as views."""
        begin, top_k = number * self._top_k, self._weights.layers[number].top_k
        chosen = torch.frombuffer(index, dtype=torch.int64, count=top_k, offset=8 * begin)
        weights = torch.frombuffer(scores, dtype=torch.float32, count=top_k, offset=4 * begin)
        return chosen[None], weights[None]

    def _normed(self, room: Any) -> Tensor:
        """Return the input of the layer's router and experts, [hidden], as a view."""
        return self._part(room, 2)

    def _set_output(self, total: Tensor, room: Any) -> None:
        """Write the layer's output, residual + `total` [1, hidden], for the next native call."""
        residual = self._part(room, 1)
        self._part(room, 0).copy_(residual + total[0].to(residual.dtype))

    def _part(self, room: Any, number: int) -> Tensor:
        hidden, dtype = self._weights.hidden, self._weights.dtype
        return torch.frombuffer(
            room, dtype=dtype, count=hidden, offset=number * hidden * dtype.itemsize
        )


def _expert_bytes(layout: ExpertLayout | None) -> int:
    if layout is None:
        return 0
    return kernels.expert_bytes(
        layout.gate_up.name, layout.down.name, layout.hidden, layout.intermediate
    )
