"""A KV cache layer that appends in place, and doubles its memory when that is full.

transformers' layer copies all keys and values for each token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from loader.decode.decoder import MIN_POSITIONS, Kind
from loader.hf.eight_bit_layer import EightBitLayer


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer over memory with spare capacity.

    `keys` and `values` are views of the memory's first positions, made on demand: native code
    appends without them. A view taken before a crop shows the positions appended after the crop.

    transformers may assign other tensors to `keys` and `values` (a reordered, cropped or selected
    batch). If they are no longer the first positions of the memory, the next update moves them into
    new memory.
    """

    is_8bit = False

    _memory: tuple[Tensor, Tensor] | None = None
    _shown: int | None = None
    """Positions of the memory that `keys` and `values` show; None after an assignment to them."""
    _place: tuple[int, int, int] | None = None
    """Addresses of the memory's keys and values, and its capacity in positions.

    Set only for a single sequence to which native code may append.
    """
    _kind: Kind | None = None
    """The kind for which `_place` was checked."""

    @classmethod
    def from_layer(cls, plain: DynamicLayer) -> "GrowingLayer":
        """Return a layer with the state of `plain`, over the same key and value tensors."""
        layer = cls()
        layer.__dict__.update(plain.__dict__)
        return layer

    @property
    def keys(self) -> Any:
        """Keys [batch, heads, length, head_dim]; None before the first update."""
        if self._shown is not None and self._memory is not None:
            return self._memory[0].narrow(2, 0, self._shown)
        return self.__dict__.get("keys")

    @keys.setter
    def keys(self, value: Any) -> None:
        self._settle()
        self.__dict__["keys"] = value

    @property
    def values(self) -> Any:
        """Values [batch, heads, length, head_dim]; None before the first update."""
        if self._shown is not None and self._memory is not None:
            return self._memory[1].narrow(2, 0, self._shown)
        return self.__dict__.get("values")

    @values.setter
    def values(self, value: Any) -> None:
        self._settle()
        self.__dict__["values"] = value

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of positions in the layer."""
        if self._shown is not None:
            return self._shown
        length: int = super().get_seq_length(*args)
        return length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, new, head_dim].

        Return views of all keys and values, [batch, heads, length, head_dim].
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Autograd rejects writes in place to memory of which it has saved a view.
            self._settle()
            self._memory = None
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        keys, values = self.reserve(key_states, value_states)
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self.show(end)
        return self.keys, self.values

    def reserve(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory of keys and values, each [batch, heads, capacity, head_dim].

        Its capacity suffices for the current positions and these new ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        memory = self._memory
        if memory is None or not self._fits(memory, key_states, length):
            capacity = max(MIN_POSITIONS, 2 * (length + key_states.shape[-2]))
            memory = (
                _moved(self.keys, key_states, length, capacity),
                _moved(self.values, value_states, length, capacity),
            )
            # In this order an interrupt between two assignments loses no position.
            self._place = None
            self._memory = memory
            self._shown = length
        return memory

    def place(self, kind: Kind) -> tuple[int, int, int]:
        """Return the addresses of the keys' and values' memory, and its capacity in positions.

        The memory has room for at least one more position. Raises ValueError if the layer holds
        several sequences or another kind of memory.
        """
        place = self._place
        if place is None or self._shown is None or self._shown >= place[2] or self._kind != kind:
            place = self._checked_place(kind)
            self._place = place
            self._kind = kind
        return place

    def _checked_place(self, kind: Kind) -> tuple[int, int, int]:
        heads, width, dtype, device = kind
        new = torch.empty((1, heads, 1, width), dtype=dtype, device=device)
        keys, values = self.reserve(new, new)
        shape = (1, heads, keys.shape[2], width)
        for memory in (keys, values):
            if (
                (memory.dtype, memory.device) != (dtype, device)
                or memory.shape != shape
                or not memory.is_contiguous()
            ):
                raise ValueError(
                    f"KV cache: expected {dtype} {shape} on {device}, got {memory.dtype}"
                    f" {tuple(memory.shape)} on {memory.device}"
                )
        return keys.data_ptr(), values.data_ptr(), keys.shape[2]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the addresses: a copy's memory lies elsewhere."""
        return {**self.__dict__, "_place": None}

    def show(self, length: int) -> None:
        """Set `keys` and `values` to the first `length` positions of the memory."""
        self._shown = length

    def reset(self) -> None:
        """Empty the layer. transformers 5.0 only zeroes the tensors, later versions drop them."""
        self._settle()
        self._memory = None
        super().reset()

    def _settle(self) -> None:
        """Replace the views on demand by stored tensors."""
        if self._shown is not None:
            self.__dict__["keys"] = self.keys
            self.__dict__["values"] = self.values
            self._shown = None
            self._place = None

    def _fits(self, memory: tuple[Tensor, Tensor], new: Tensor, length: int) -> bool:
        # torch rejects writes to a tensor of inference mode outside of that mode.
        if memory[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        if length + new.shape[-2] > memory[0].shape[2] or memory[0].shape[0] != new.shape[0]:
            return False
        # transformers concatenates, which promotes to the wider of the two dtypes.
        if torch.promote_types(memory[0].dtype, new.dtype) != memory[0].dtype:
            return False
        return (
            length == 0
            or self._shown is not None
            or all(
                part.data_ptr() == now.data_ptr() and part.stride() == now.stride()
                for part, now in zip(memory, (self.keys, self.values), strict=True)
            )
        )


def _moved(present: Tensor, new: Tensor, length: int, capacity: int) -> Tensor:
    """Return new memory [batch, heads, capacity, head_dim] that begins with `present`."""
    batch, heads, _, width = new.shape
    dtype = torch.promote_types(present.dtype, new.dtype) if length else new.dtype
    memory = new.new_empty((batch, heads, capacity, width), dtype=dtype)
    if length:
        memory[:, :, :length] = present
    return memory


def growing_layer(
    cache: Cache | None, layer: int, kv_bits: int = 16
) -> GrowingLayer | EightBitLayer | None:
    """Return layer `layer` of a plain DynamicCache, with room to grow.

    Replaces a plain DynamicLayer in the cache; with kv_bits 8 also a GrowingLayer, whose content is
    quantized. For any other kind of cache or layer (static, sliding, quantized, offloaded) it
    returns None and changes nothing.
    """
    if cache is None or type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    kind: type[GrowingLayer] | type[EightBitLayer] = GrowingLayer
    replaced: tuple[type[DynamicLayer], ...] = (DynamicLayer,)
    if kv_bits == 8:
        kind = EightBitLayer
        replaced = (DynamicLayer, GrowingLayer)
    layers = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(layers) <= layer:
            layers.append(kind())
    if layer >= len(layers):
        return None
    present = layers[layer]
    if type(present) in replaced:
        present = kind.from_layer(present)
        layers[layer] = present
    return present if type(present) is kind else None


def growing_layers(
    cache: Cache | None, count: int, kv_bits: int = 16
) -> list[GrowingLayer | EightBitLayer] | None:
    """Return `growing_layer` for layers 0 to count - 1.

    Returns None if one of them is None or if their lengths differ.
    """
    layers: list[GrowingLayer | EightBitLayer] = []
    for number in range(count):
        layer = growing_layer(cache, number, kv_bits)
        if layer is None or (layers and layer.get_seq_length() != layers[0].get_seq_length()):
            return None
        layers.append(layer)
    return layers
