"""Native calls for one token: attention over the growing cache, experts; rules as in loader/kernels.py."""

from ctypes import byref, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from loader import kernels
from loader.copies import Derived
from loader.growing_cache import GrowingLayer, Kind
from loader.native_library import Attention, library

_ACCUMULATE = 1


@dataclass(frozen=True)
class AttentionWeights:
    """The four packed matrices of a layer's attention; each `tiles` uint8, dense, on the CPU."""

    q: kernels.PackedMatrix
    k: kernels.PackedMatrix
    v: kernels.PackedMatrix
    o: kernels.PackedMatrix


class AttentionStep(Derived):
    """One token's way through one layer's attention, checked once. Keeps the weights alive."""

    def __init__(self, weights: AttentionWeights, hidden: int, head_dim: int, scale: float, dtype: torch.dtype) -> None:
        self.weights = weights
        self.dtype = dtype
        self.structure = Attention(hidden=hidden, head_dim=head_dim, scale=scale, dtype=kernels.DTYPES[dtype])
        self.kind: Kind = (weights.k.rows // head_dim, head_dim, dtype, torch.device("cpu"))
        for name in ("q", "k", "v", "o"):
            matrix: kernels.PackedMatrix = getattr(weights, name)
            columns = weights.q.rows if name == "o" else hidden
            if matrix.tiles.numel() < kernels.packed_bytes(matrix.packing, matrix.rows, columns):
                raise ValueError(f"{name}: {matrix.tiles.numel()} bytes are too few for {matrix.rows} x {columns}")
            entry = getattr(self.structure, name)
            entry.tiles, entry.rows = matrix.tiles.data_ptr(), matrix.rows
            entry.packing = library().moe_packing_id(matrix.packing.encode())
        self._run = library().moe_attention_step

    def append(self, x: Tensor, cos: Tensor, sin: Tensor, layer: GrowingLayer) -> Tensor:
        """x [1, 1, hidden], cos and sin [1, 1, head_dim] -> a tensor like x; `layer` is one position longer then.

        ValueError if a dtype or a size is another.
        """
        length = layer.get_seq_length()
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        self.check(x, cos, sin)
        keys_at, values_at, capacity = layer.place(self.kind)
        out = torch.empty_like(x)
        error = self._run(
            byref(self.structure), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys_at, values_at, capacity, length,
            out.data_ptr(),
        )  # fmt: skip
        if error:
            raise ValueError(f"native attention: error {error} at position {length} of {capacity}")
        layer.show(length + 1)
        return out

    def check(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """ValueError if these, dense, are not one token's."""
        if not (x.dtype is cos.dtype is sin.dtype is self.dtype) or not (
            x.numel() == self.structure.hidden and cos.numel() == sin.numel() == self.structure.head_dim
        ):
            raise ValueError(
                f"one token of {self.dtype}: got x {tuple(x.shape)} {x.dtype}, cos {tuple(cos.shape)} {cos.dtype}, "
                f"sin {tuple(sin.shape)} {sin.dtype}"
            )


class ExpertsStep:
    """One token's way through its experts of a layer: sizes and packings, checked once. Holds no experts."""

    def __init__(self, layout: ExpertLayout, experts: int) -> None:
        self._expert_bytes = kernels.expert_bytes(
            layout.gate_up.name, layout.down.name, layout.hidden, layout.intermediate
        )
        self._hidden, self._pointers = layout.hidden, c_void_p * experts
        ids = [library().moe_packing_id(packing.name.encode()) for packing in (layout.gate_up, layout.down)]
        self._sizes = experts, *ids, layout.hidden, layout.intermediate
        self._run = library().moe_experts_topk

    def add(self, blobs: dict[int, Tensor], x: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        """Adds to `out` as `Backend.experts` does; all tensors dense, of one token. ValueError if a size is another."""
        pointers = self._pointers()
        for expert, blob in blobs.items():
            if blob.numel() < self._expert_bytes or not blob.is_contiguous():
                raise ValueError(f"expert {expert}: {blob.numel()} bytes, {self._expert_bytes} needed")
            pointers[expert] = blob.data_ptr()
        dtypes = x.dtype, out.dtype, weights.dtype, index.dtype
        if (
            dtypes != (torch.float32, torch.float32, torch.float32, torch.int64)
            or not x.numel() == out.numel() == self._hidden
            or not out.is_contiguous()
        ):
            raise ValueError(f"one token of {self._hidden} float32: got {tuple(x.shape)}, {tuple(out.shape)}, {dtypes}")
        error = self._run(
            pointers, *self._sizes, index.data_ptr(), weights.data_ptr(), index.numel(), x.data_ptr(), out.data_ptr(),
            1, _ACCUMULATE,
        )  # fmt: skip
        if error:
            raise ValueError(f"native experts: error {error} for {index.tolist()}")
