"""One token through its experts of a layer, in one native call."""

from ctypes import addressof, byref, c_void_p

import torch
from torch import Tensor

from formats.expert import ExpertLayout
from loader.arithmetic import kernels
from loader.arithmetic.native_library import LayerExperts, Routing, library, packing_id

_ACCUMULATE = 1
"""Flag of moe_experts_topk: add to the output (loader/native/moe_kernels.h)."""


class ExpertsStep:
    """Computes one token's experts of a layer. Sizes and packings are checked once.

    Holds no experts.
    """

    def __init__(self, layout: ExpertLayout, experts: int) -> None:
        self._expert_bytes = kernels.expert_bytes(
            layout.gate_up.name, layout.down.name, layout.hidden, layout.intermediate
        )
        self._hidden, self._pointers = layout.hidden, c_void_p * experts
        self._sizes = {
            "hidden": layout.hidden,
            "intermediate": layout.intermediate,
            "count": experts,
            "gate_up_packing": packing_id(layout.gate_up.name),
            "down_packing": packing_id(layout.down.name),
        }
        self._run = library().moe_experts_topk

    def add(
        self, blobs: dict[int, Tensor], x: Tensor, index: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        """Add one token's experts to `out` (`Backend.experts`); all tensors are dense.

        Raises ValueError if a size or dtype does not match the layout.
        """
        pointers = self._pointers()
        for expert, blob in blobs.items():
            if blob.numel() < self._expert_bytes or not blob.is_contiguous():
                raise ValueError(
                    f"expert {expert}: {blob.numel()} bytes, {self._expert_bytes} needed"
                )
            pointers[expert] = blob.data_ptr()
        dtypes = x.dtype, out.dtype, weights.dtype, index.dtype
        if (
            dtypes != (torch.float32, torch.float32, torch.float32, torch.int64)
            or not x.numel() == out.numel() == self._hidden
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"expected one token of {self._hidden} float32:"
                f" got {tuple(x.shape)}, {tuple(out.shape)}, {dtypes}"
            )
        experts = LayerExperts(blobs=addressof(pointers), **self._sizes)
        routing = Routing(index.data_ptr(), weights.data_ptr(), tokens=1, top_k=index.numel())
        error = self._run(byref(experts), byref(routing), x.data_ptr(), out.data_ptr(), _ACCUMULATE)
        if error:
            raise ValueError(f"native experts: error {error} for {index.tolist()}")
