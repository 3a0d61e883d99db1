"""The `weight` of a packed linear layer: PEFT and others look at it before they use the layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from formats.errors import MoeConvertError


class PackedWeight(Tensor):
    """A tensor with the shape and device of a packed matrix, and without values: every operation
    raises MoeConvertError.

    A dequantized copy would be worse: what is added to it, as by PEFT's merge, would be lost
    without a word.
    """

    @staticmethod
    def __new__(cls, rows: int, columns: int, device: torch.device) -> "PackedWeight":
        # float32, in which the products are summed: PEFT gives its adapters this dtype.
        result: PackedWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (rows, columns), dtype=torch.float32, device=device
        )
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        raise MoeConvertError(
            f"{func}: the weights are packed, and can neither be read nor changed as a tensor",
            "leave adapters unmerged; or convert with --attn-bits 16 (--head-bits 16 for the head)",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, device={self.device})"
