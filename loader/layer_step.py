"""One token's way through a whole decoder layer in two native calls, between which the experts are fetched."""

from ctypes import byref, c_char, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from loader import kernels
from loader.cache import ExpertSource
from loader.copies import Derived
from loader.growing_cache import GrowingLayer
from loader.lease import Lease
from loader.native_library import Layer, library
from loader.prefetch import in_order, ranked
from loader.step_kernels import AttentionStep


@dataclass(frozen=True)
class LayerWeights:
    """The plain weights of a layer, of the activations' dtype: [hidden] twice, [experts, hidden]; and RMSNorm's eps."""

    attention_norm: Tensor
    experts_norm: Tensor
    router: Tensor
    eps: float


class LayerStep(Derived):
    """A layer's weights and sizes, checked once; keeps the weights alive. ValueError if they do not fit together."""

    def __init__(self, attention: AttentionStep, weights: LayerWeights, layout: ExpertLayout, top_k: int) -> None:
        hidden, experts = attention.structure.hidden, weights.router.shape[0]
        for tensor, shape in (
            (weights.attention_norm, (hidden,)),
            (weights.experts_norm, (hidden,)),
            (weights.router, (experts, hidden)),
        ):
            if tensor.dtype is not attention.dtype or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(f"expected dense {shape} of {attention.dtype}, got {tensor.shape} {tensor.dtype}")
        if layout.hidden != hidden:
            raise ValueError(f"experts for {layout.hidden} values, attention for {hidden}")
        self.attention, self._weights = attention, weights
        self._packings = layout.gate_up.name, layout.down.name
        ids = [library().moe_packing_id(name.encode()) for name in self._packings]
        self.structure = Layer(
            attention=attention.structure,
            attention_norm=weights.attention_norm.data_ptr(),
            experts_norm=weights.experts_norm.data_ptr(),
            router=weights.router.data_ptr(),
            intermediate=layout.intermediate,
            eps=weights.eps,
            experts=experts,
            top_k=top_k,
            gate_up_packing=ids[0],
            down_packing=ids[1],
        )
        self._at = byref(self.structure)
        self._expert_bytes = kernels.expert_bytes(*self._packings, hidden, layout.intermediate)
        self._index, self._scores, self._pointers = c_int64 * top_k, c_float * top_k, c_void_p * experts
        self._buffer = c_char * (hidden * attention.dtype.itemsize)
        self._begin, self._end = library().moe_layer_begin, library().moe_layer_end

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: GrowingLayer, number: int, experts: ExpertSource
    ) -> Tensor:
        """x [1, 1, hidden], cos and sin [1, 1, head_dim] -> a tensor like x. `past` is one position longer then; the
        experts are those of layer `number`, asked for by rank. Errors as `formats.reader.Load`; ValueError if a size is
        another."""
        length = past.get_seq_length()
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        self.attention.check(x, cos, sin)
        keys_at, values_at, capacity = past.place(self.attention.kind)
        residual, normed = self._buffer(), self._buffer()
        index, scores = self._index(), self._scores()
        error = self._begin(
            self._at, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys_at, values_at, capacity,
            length, residual, normed, index, scores,
        )  # fmt: skip
        if error:
            raise ValueError(f"native attention: error {error} at position {length} of {capacity}")
        with experts.lease(number, list(index)) as lease:
            if ahead := experts.router_ahead(number):
                router, guesses = ahead
                row = torch.frombuffer(normed, dtype=x.dtype)[None]
                experts.guess(number + 1, in_order(ranked(router, row, guesses)))
            if lease.is_complete or len(index) > 2:
                out = self._finish(lease.all(), index, scores, residual, normed, x)
            else:
                out = self._finish_in_parts(lease, index, scores, residual, normed, x)
        past.show(length + 1)
        return out

    def _finish(
        self, blobs: dict[int, Tensor], index: Any, scores: Any, residual: Any, normed: Any, x: Tensor
    ) -> Tensor:
        pointers = self._pointers()
        for expert, blob in blobs.items():
            pointers[expert] = self.address(expert, blob)
        out = torch.empty_like(x)
        error = self._end(pointers, self._at, index, scores, residual, normed, out.data_ptr())
        if error:
            raise ValueError(f"native experts: error {error} for {list(blobs)}")
        return out

    def _finish_in_parts(self, lease: Lease, index: Any, scores: Any, residual: Any, normed: Any, x: Tensor) -> Tensor:
        """The bits of `_finish`, while experts arrive: of two terms the order changes nothing (docs/numerics.md)."""
        sizes = self.structure
        table = kernels.ExpertTable(sizes.experts, sizes.attention.hidden, sizes.intermediate, *self._packings)
        chosen, weights = torch.frombuffer(index, dtype=torch.int64), torch.frombuffer(scores, dtype=torch.float32)
        inputs = torch.frombuffer(normed, dtype=x.dtype).float()[None]
        total = torch.zeros_like(inputs)
        for blobs in lease.parts():
            for expert, blob in blobs.items():
                table.set(expert, blob)
            table.run(inputs, chosen[None], weights[None], total, partial=True)
            for expert in blobs:
                table.set(expert, None)
        return (torch.frombuffer(residual, dtype=x.dtype) + total.to(x.dtype)).view_as(x)

    def address(self, expert: int, blob: Tensor) -> int:
        """Where the bytes of `expert` lie; ValueError if they are too few."""
        if blob.numel() < self._expert_bytes or not blob.is_contiguous():
            raise ValueError(f"expert {expert}: {blob.numel()} bytes, {self._expert_bytes} needed")
        return blob.data_ptr()
