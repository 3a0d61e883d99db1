"""cos and sin of the rotary embedding by position: the model's own values, computed for many
positions at a time.
"""

from ctypes import string_at
from typing import Any

import torch
from torch import Tensor

POSITIONS = 256
"""Positions that are computed together; a power of two."""
BLOCKS = 8
"""Blocks kept: 1 MiB in bfloat16 at a head width of 128."""


class RotaryTable:
    """Rows of `rotary`, a rotary embedding of transformers whose values depend on the position
    alone, in `dtype`.
    """

    def __init__(self, rotary: Any, dtype: torch.dtype) -> None:
        self._rotary, self.dtype = rotary, dtype
        self._frequencies, self._state = rotary.inv_freq, _state(rotary)
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def fits(rotary: Any) -> bool:
        """Whether the values depend on the position alone: other kinds follow the longest sequence
        seen.
        """
        return getattr(rotary, "rope_type", None) == "default"

    def is_of(self, rotary: Any) -> bool:
        """Whether `rotary` still gives these values."""
        return rotary is self._rotary and _state(rotary) == self._state

    def find(self, position: int) -> tuple[Tensor, Tensor, int]:
        """cos and sin of POSITIONS positions, each [1, POSITIONS, head_dim], and the row of
        `position`.
        """
        number, row = divmod(position, POSITIONS)
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) >= BLOCKS:
                # A new dict, not an emptied one: another thread may be looking.
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


def _state(rotary: Any) -> tuple[Any, ...]:
    """What the values depend on, to be compared for each token: the frequencies themselves, or on a
    GPU, where reading them takes longer than the token, their place and the number of changes; a
    change by `.data` is not seen there.
    """
    frequencies: Tensor = rotary._buffers["inv_freq"]
    if frequencies.device.type == "cpu":
        dense = frequencies.contiguous()
        content: Any = string_at(dense.data_ptr(), dense.nbytes)
    else:
        content = frequencies.data_ptr(), 0 if frequencies.is_inference() else frequencies._version
    return rotary.rope_type, rotary.attention_scaling, content
