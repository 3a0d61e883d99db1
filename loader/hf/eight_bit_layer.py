"""A KV cache layer in 8 bits: int8 codes with a scale for each 64 values.

Appends are quantized in place, by `update` or by native code. transformers' attention gets
dequantized copies of all positions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from formats.errors import MoeConvertError
from loader.decode import kv_blocks
from loader.decode.decoder import MIN_POSITIONS, Kind
from loader.decode.kv_blocks import Part


class EightBitLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer over blocks of codes (`loader.decode.kv_blocks`) with spare capacity.

    `keys` and `values` are copies; only methods change the content.
    """

    is_8bit = True

    _blocks: tuple[Tensor, Tensor] | None = None
    """Keys and values, uint8 [batch, heads, blocks, bytes of a block]."""
    _length = 0
    _width = 0
    _dtype = torch.float32
    """Dtype of dequantized keys and values: that of the latest update."""

    @classmethod
    def from_layer(cls, plain: DynamicLayer) -> "EightBitLayer":
        """Return a layer with the quantized keys and values of `plain`."""
        layer = cls()
        if plain.get_seq_length():
            with torch.no_grad():
                layer.update(plain.keys.detach(), plain.values.detach())
        return layer

    @property
    def keys(self) -> Any:
        """Dequantized keys [batch, heads, length, head_dim]; None before the first update."""
        return self._part(Part.KEYS, self._dtype) if self._blocks else None

    @keys.setter
    def keys(self, value: Any) -> None:
        self._refuse(value)

    @property
    def values(self) -> Any:
        """Dequantized values [batch, heads, length, head_dim]; None before the first update."""
        return self._part(Part.VALUES, self._dtype) if self._blocks else None

    @values.setter
    def values(self, value: Any) -> None:
        self._refuse(value)

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Memory of keys and values, including room to grow; empty before the first update."""
        return self._blocks or ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: `update` allocates."""

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of positions in the layer."""
        return self._length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantize and append keys and values [batch, heads, new, head_dim].

        Return all keys and values, dequantized to the dtype of the new ones, [batch, heads, length,
        head_dim].
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise MoeConvertError(
                "kv_bits: a KV cache of 8 bits passes no gradients",
                "call the model under torch.no_grad(), or with use_cache=False",
            )
        batch, heads, new, width = key_states.shape
        self._dtype = key_states.dtype
        keys, values = self._reserve(batch, heads, self._length + new, width)
        kv_blocks.store(keys, self._length, key_states, Part.KEYS)
        kv_blocks.store(values, self._length, value_states, Part.VALUES)
        self.show(self._length + new)
        return self.dequantized(self._dtype)

    def dequantized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return copies of all keys and values in `dtype`, [batch, heads, length, head_dim].

        The layer must not be empty. A product of code and scale is exact in float32.
        """
        return self._part(Part.KEYS, dtype), self._part(Part.VALUES, dtype)

    def place(self, kind: Kind) -> tuple[int, int, int]:
        """Return the addresses of the keys' and values' memory, and its capacity in positions.

        The memory has room for at least one more position. Raises ValueError if the layer holds
        several sequences or heads of another kind.
        """
        heads, width, dtype, device = kind
        keys, values = self._reserve(1, heads, self._length + 1, width)
        shape = (1, heads, kv_blocks.block_bytes(width))
        fits = (*keys.shape[:2], keys.shape[3]) == shape
        if (
            not fits
            or device.type != "cpu"
            or not (keys.is_contiguous() and values.is_contiguous())
        ):
            raise ValueError(
                f"KV cache in 8 bits: expected {shape[:2]} sequences and heads of {width} on"
                f" {device}, got {tuple(keys.shape)} on {keys.device}"
            )
        self._dtype = dtype
        return keys.data_ptr(), values.data_ptr(), keys.shape[2] * kv_blocks.POSITIONS

    def show(self, length: int) -> None:
        """Set the number of positions to `length`, at most the capacity."""
        self._length = length
        self.is_initialized = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove positions at the end: a negative number; a positive one is the new length."""
        length = self._length + tokens_to_remove if tokens_to_remove < 0 else tokens_to_remove
        if tokens_to_remove:
            self._length = max(0, min(self._length, length))

    def reset(self) -> None:
        """Empty the layer."""
        # In this order an interrupt leaves no positions without memory.
        self._length = 0
        self._blocks = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences `beam_idx`, for beam search."""
        self._select(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        self._select(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._select(lambda part: part[indices, ...])

    def copied(self, length: int) -> "EightBitLayer":
        """Return a layer with copies of the first `length` positions."""
        layer = EightBitLayer()
        layer.__dict__.update(self.__dict__)
        count = -(-length // kv_blocks.POSITIONS)
        layer._select(lambda part: part[:, :, :count].clone())
        layer._length = length
        return layer

    def _select(self, change: Any) -> None:
        if self._blocks is not None:
            keys, values = self._blocks
            self._blocks = (change(keys), change(values))

    def _reserve(self, batch: int, heads: int, length: int, width: int) -> tuple[Tensor, Tensor]:
        """Return memory of keys and values for at least `length` positions."""
        blocks = self._blocks
        if blocks is not None and self._length:
            # Other sequences or heads do not fit: writing them then raises an error.
            batch, heads, width = *blocks[0].shape[:2], self._width
        elif blocks is not None and (*blocks[0].shape[:2], self._width) != (batch, heads, width):
            blocks = None
        # torch rejects writes to a tensor of inference mode outside of that mode.
        if (
            blocks is not None
            and length <= blocks[0].shape[2] * kv_blocks.POSITIONS
            and (not blocks[0].is_inference() or torch.is_inference_mode_enabled())
        ):
            return blocks
        capacity = max(MIN_POSITIONS, 2 * length)
        new = [kv_blocks.empty(batch, heads, capacity, width) for _ in range(2)]
        if blocks is not None:
            count = -(-self._length // kv_blocks.POSITIONS)
            for part, old in zip(new, blocks, strict=True):
                part[:, :, :count] = old[:, :, :count]
        self._width = width
        self._blocks = (new[0], new[1])
        return self._blocks

    def _part(self, part: Part, dtype: torch.dtype) -> Tensor:
        blocks = self.memory[0 if part is Part.KEYS else 1]
        return kv_blocks.load(blocks, self._length, self._width, part, dtype)

    def _refuse(self, value: Any) -> None:
        if value is None:  # transformers' constructor
            return
        raise MoeConvertError(
            "kv_bits: keys and values of a KV cache in 8 bits cannot be replaced",
            "change the cache by its methods, or load the model with kv_bits=16",
        )
