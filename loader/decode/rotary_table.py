"""A table of cos and sin of a model's rotary embedding, computed for many positions at a time."""

from ctypes import string_at
from typing import Any

import torch
from torch import Tensor

POSITIONS = 256
"""Positions in a block, computed together."""
BLOCKS = 8
"""Blocks kept in memory: 1 MiB in bfloat16 with head_dim 128."""


class RotaryTable:
    """Rows of cos and sin of `rotary` in `dtype`.

    rotary: a rotary embedding of transformers whose values depend only on the position (`fits`).
    """

    def __init__(self, rotary: Any, dtype: torch.dtype) -> None:
        self._rotary = rotary
        self.dtype = dtype
        self._frequencies = rotary.inv_freq
        self._state = _state(rotary)
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def fits(rotary: Any) -> bool:
        """True if values depend only on the position; some kinds depend on the longest sequence."""
        return getattr(rotary, "rope_type", None) == "default"

    def is_of(self, rotary: Any) -> bool:
        """True if `rotary` still gives these values."""
        return rotary is self._rotary and _state(rotary) == self._state

    def find(self, position: int) -> tuple[Tensor, Tensor, int]:
        """Return cos and sin of a block, [1, POSITIONS, head_dim], and the row of `position`."""
        number, row = divmod(position, POSITIONS)
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) >= BLOCKS:
                # A new dict, because another thread may be reading the old one.
                self._blocks = {}
            block = self._blocks[number] = self._computed(number)
        return (*block, row)

    def _computed(self, number: int) -> tuple[Tensor, Tensor]:
        device = self._frequencies.device
        positions = torch.arange(number * POSITIONS, (number + 1) * POSITIONS, device=device)[None]
        with torch.no_grad():
            like = torch.empty(1, dtype=self.dtype, device=device)
            cos, sin = type(self._rotary).forward(self._rotary, like, positions)
        return cos.contiguous(), sin.contiguous()


def row_offset_bytes(cos: Tensor, sin: Tensor, row: int, width: int, dtype: torch.dtype) -> int:
    """Return the offset of `row` in cos and sin, in bytes.

    Raises ValueError unless both are of `dtype` and of one shape [1, positions, width].
    """
    if not (cos.dtype is sin.dtype is dtype and cos.shape == sin.shape and cos.shape[-1] == width):
        raise ValueError(
            f"rotary embedding of {dtype} [{width}]: got {cos.dtype} {tuple(cos.shape)}"
        )
    return row * width * dtype.itemsize


def _state(rotary: Any) -> tuple[Any, ...]:
    """Return a value that changes with the table's values; it is compared for each token.

    It contains the frequencies. On a GPU reading them would take longer than the token, so there it
    contains their address and version; changes through `.data` are not noticed.
    """
    frequencies: Tensor = rotary._buffers["inv_freq"]
    if frequencies.device.type == "cpu":
        dense = frequencies.contiguous()
        content: Any = string_at(dense.data_ptr(), dense.nbytes)
    else:
        content = frequencies.data_ptr(), 0 if frequencies.is_inference() else frequencies._version
    return rotary.rope_type, rotary.attention_scaling, content
