"""A KV cache layer that appends in place: its memory doubles when it is full, instead of being
copied at each token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from loader.decode.decoder import Kind

LEAST_POSITIONS = 256


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' DynamicLayer over memory with room to spare: `keys` and `values` are views of
    its beginning.

    What transformers assigns to them (a reordered, cropped or selected batch) is taken as it is: if
    that is not the beginning of the memory any more, the next token moves it into new memory. A
    view taken before a crop shows what is appended after it. The views are made when somebody asks:
    while native code appends, nobody does.
    """

    _memory: tuple[Tensor, Tensor] | None = None
    _shown: int | None = None
    """Positions of the memory that are the keys and values; None where those were assigned."""
    _place: tuple[int, int, int] | None = None
    """Addresses of the memory's keys and values, and its capacity, where native code may write one
    sequence.
    """
    _kind: Kind | None = None
    """What `_place` was checked for."""

    @classmethod
    def of(cls, plain: DynamicLayer) -> "GrowingLayer":
        """Return a layer with the state of `plain`: its keys and values are the same tensors."""
        layer = cls()
        layer.__dict__.update(plain.__dict__)
        return layer

    @property
    def keys(self) -> Any:
        """[batch, heads, length, head_dim], None before the first update."""
        if self._shown is not None and self._memory is not None:
            return self._memory[0].narrow(2, 0, self._shown)
        return self.__dict__.get("keys")

    @keys.setter
    def keys(self, value: Any) -> None:
        self._settle()
        self.__dict__["keys"] = value

    @property
    def values(self) -> Any:
        """As keys."""
        if self._shown is not None and self._memory is not None:
            return self._memory[1].narrow(2, 0, self._shown)
        return self.__dict__.get("values")

    @values.setter
    def values(self, value: Any) -> None:
        self._settle()
        self.__dict__["values"] = value

    def get_seq_length(self, *args: Any) -> int:
        """Positions held."""
        if self._shown is not None:
            return self._shown
        length: int = super().get_seq_length(*args)
        return length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, new, head_dim]; all keys and values [batch, heads, length,
        head_dim], as views.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Autograd forbids to write beside what it has saved.
            self._settle()
            self._memory = None
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        length, new = self.get_seq_length(), key_states.shape[-2]
        keys, values = self.room(key_states, value_states)
        keys[:, :, length : length + new] = key_states
        values[:, :, length : length + new] = value_states
        self.show(length + new)
        return self.keys, self.values

    def room(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The memory [batch, heads, capacity, head_dim], with room for these new positions after
        the present ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        memory = self._memory
        if memory is None or not self._fits(memory, key_states, length):
            capacity = max(LEAST_POSITIONS, 2 * (length + key_states.shape[-2]))
            keys, values = self.keys, self.values
            memory = (
                _moved(keys, key_states, length, capacity),
                _moved(values, value_states, length, capacity),
            )
            # In this order: an interrupt between any two leaves the present positions as they are.
            self._place = None
            self._memory = memory
            self._shown = length
        return memory

    def place(self, kind: Kind) -> tuple[int, int, int]:
        """Addresses of the memory's keys and values, and its capacity, with room for one position
        more than the present ones. ValueError if the memory is of another kind, or of several
        sequences.
        """
        place = self._place
        if place is None or self._shown is None or self._shown >= place[2] or self._kind != kind:
            place = self._place = self._checked_place(kind)
            self._kind = kind
        return place

    def _checked_place(self, kind: Kind) -> tuple[int, int, int]:
        heads, width, dtype, device = kind
        new = torch.empty((1, heads, 1, width), dtype=dtype, device=device)
        keys, values = self.room(new, new)
        shape = (1, heads, keys.shape[2], width)
        for memory in (keys, values):
            if (
                (memory.dtype, memory.device) != (dtype, device)
                or memory.shape != shape
                or not memory.is_contiguous()
            ):
                raise ValueError(
                    f"cache of {dtype} {shape} on {device}: got {tuple(memory.shape)} {memory.dtype} on {memory.device}"
                )
        return keys.data_ptr(), values.data_ptr(), keys.shape[2]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: not the addresses, its memory lies elsewhere."""
        return {**self.__dict__, "_place": None}

    def show(self, length: int) -> None:
        """Makes the first `length` positions of the memory the layer's keys and values."""
        self._shown = length

    def reset(self) -> None:
        """Empties the layer; later versions of transformers drop the tensors, 5.0 only zeroes them."""
        self._settle()
        self._memory = None
        super().reset()

    def _settle(self) -> None:
        """From views on demand to tensors of its own."""
        if self._shown is not None:
            self.__dict__["keys"], self.__dict__["values"] = self.keys, self.values
            self._shown = self._place = None

    def _fits(self, memory: tuple[Tensor, Tensor], new: Tensor, length: int) -> bool:
        # torch forbids to write memory of inference mode outside of it.
        if memory[0].is_inference() and not torch.is_inference_mode_enabled():
            return False
        if length + new.shape[-2] > memory[0].shape[2] or memory[0].shape[0] != new.shape[0]:
            return False
        # As where they are concatenated: what was of a narrower dtype becomes a wider one.
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
    batch, heads, _, width = new.shape
    dtype = torch.promote_types(present.dtype, new.dtype) if length else new.dtype
    memory = new.new_empty((batch, heads, capacity, width), dtype=dtype)
    if length:
        memory[:, :, :length] = present
    return memory


def growing_layer(cache: Cache | None, layer: int) -> GrowingLayer | None:
    """The `GrowingLayer` number `layer` of a plain DynamicCache, put there in place of a plain
    DynamicLayer.

    None for every other kind of cache or layer (static, sliding, quantized, offloaded): they stay
    as they are.
    """
    if cache is None or type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    layers = cache.layers
    if cache.layer_class_to_replicate is DynamicLayer:
        while len(layers) <= layer:
            layers.append(GrowingLayer())
    if layer >= len(layers):
        return None
    present = layers[layer]
    if type(present) is DynamicLayer:
        present = layers[layer] = GrowingLayer.of(present)
    return present if type(present) is GrowingLayer else None


def growing_layers(cache: Cache | None, count: int) -> list[GrowingLayer] | None:
    """`growing_layer` of the layers from 0 on, if there are `count` of one length."""
    found: list[GrowingLayer] = []
    for number in range(count):
        layer = growing_layer(cache, number)
        if layer is None or (found and layer.get_seq_length() != found[0].get_seq_length()):
            return None
        found.append(layer)
    return found
