"""One layer's experts by number, for native calls that take the router's choice."""

from ctypes import addressof, byref, c_void_p

import torch

from loader.arithmetic.kernel_arguments import (
    check_bytes,
    check_dense,
    check_status,
    matrix_shape,
    same_shape,
)
from loader.arithmetic.kernels import expert_bytes
from loader.arithmetic.native_library import LayerExperts, Routing, library, packing_id

_ACCUMULATE = 1
_PARTIAL = 2
"""Flags of moe_experts_topk (loader/native/moe_kernels.h)."""


class ExpertTable:
    """One layer's experts by number, each checked once.

    Holds a reference to each blob that is set. Do not change it while a call runs.
    """

    def __init__(
        self, experts: int, hidden: int, intermediate: int, gate_up: str, down: str
    ) -> None:
        self._run = library().moe_experts_topk
        self._hidden, self._count = hidden, experts
        self.expert_bytes = expert_bytes(gate_up, down, hidden, intermediate)
        self._pointers = (c_void_p * experts)()
        self._experts = LayerExperts(
            blobs=addressof(self._pointers),
            hidden=hidden,
            intermediate=intermediate,
            count=experts,
            gate_up_packing=packing_id(gate_up),
            down_packing=packing_id(down),
        )
        self._blobs: list[torch.Tensor | None] = [None] * experts

    def set(self, expert: int, blob: torch.Tensor | None) -> None:
        """Set the bytes of an expert, uint8 of at least `expert_bytes`, or remove them."""
        if not 0 <= expert < self._count:
            raise ValueError(f"expert {expert}: the table has {self._count}")
        if blob is not None:
            check_bytes("blob", blob, self.expert_bytes)
        self._blobs[expert] = blob
        self._pointers[expert] = None if blob is None else blob.data_ptr()

    def run(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor | None = None,
        partial: bool = False,
    ) -> torch.Tensor:
        """Return the router-weighted sum of experts, float32 [T, hidden], in ascending order.

        x: float32 [T, hidden]. index: chosen experts, int64 [T, k]. weights: float32 [T, k].
        out: if given, the sum is added to it.
        partial: True skips experts that are not set; calls over ascending parts of the experts then
        give the bits of one call over all. False raises ValueError for them.
        """
        tokens, hidden = matrix_shape("x", x, torch.float32)
        top_k = matrix_shape("index", index, torch.int64)[1]
        check_dense("weights", weights, torch.float32)
        if hidden != self._hidden or index.shape[0] != tokens or weights.shape != index.shape:
            raise ValueError(
                f"x {tuple(x.shape)}, index {tuple(index.shape)}, weights {tuple(weights.shape)}: "
                f"expected [T, {self._hidden}], [T, k], [T, k]"
            )
        flags = (0 if out is None else _ACCUMULATE) | (_PARTIAL if partial else 0)
        out = torch.empty_like(x) if out is None else same_shape(out, x)
        routing = Routing(index.data_ptr(), weights.data_ptr(), tokens, top_k)
        check_status(
            self._run(byref(self._experts), byref(routing), x.data_ptr(), out.data_ptr(), flags)
        )
        return out
