"""The `weight` of a packed linear layer, of which PEFT and others read shape, dtype and device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from formats.errors import MoeConvertError

MERGE_HINT = (
    "merge the adapter before quantizing: moe-convert convert BASE --adapter ADAPTER -o OUT"
)
UNPACKED_HINT = "convert with --attn-bits 16 (--head-bits 16 for the head)"


class PackedWeight(Tensor):
    """A tensor without values, with the shape and device of a packed matrix.

    Every operation raises MoeConvertError. A dequantized copy in its place would silently lose
    changes, such as those of PEFT's merge.
    """

    @staticmethod
    def __new__(cls, rows: int, columns: int, device: torch.device) -> "PackedWeight":
        # PEFT gives its adapters this dtype. Products are summed in float32.
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
            f"{func}: packed weights cannot be read or changed as a tensor, so no adapter can be"
            " merged into them",
            f"leave the adapter unmerged; or {MERGE_HINT}; or {UNPACKED_HINT}",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({list(self.shape)}, device={self.device})"
