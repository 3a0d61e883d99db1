"""Restores the KV cache's length after a forward pass that failed."""

import logging
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from loader.hf.eight_bit_layer import EightBitLayer

_log = logging.getLogger(__name__)


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the DynamicCache among the arguments of a model's forward, or None."""
    past = args[3] if len(args) > 3 else kwargs.get("cache", kwargs.get("past_key_values"))
    return past if isinstance(past, DynamicCache) else None


def length_of(cache: Any) -> int:
    """Return the number of positions in the cache; 0 without a cache."""
    return cache.get_seq_length() if cache is not None else 0


def shorten(cache: Any, length: int) -> None:
    """Cut each layer of the cache to `length` positions."""
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, EightBitLayer):
            if layer.get_seq_length() > length:
                layer.show(length)
        elif isinstance(layer, DynamicLayer) and not layer.is_sliding:
            # crop expects keys and values of one length; a failed pass may have added only keys.
            layer.keys = _first(layer.keys, length)
            layer.values = _first(layer.values, length)
        elif (added := layer.get_seq_length() - length) > 0:
            try:
                # Every version of transformers takes the number of positions to drop as a negative
                # number; only earlier ones take a length.
                layer.crop(-added) if length else layer.reset()
            except (RuntimeError, ValueError) as e:
                # A sliding window has already dropped positions that belong to the former length.
                _log.warning(
                    "the KV cache is no longer usable; start again from the whole text: %s", e
                )
                return


def _first(part: Any, length: int) -> Any:
    """Return the first `length` positions of keys or values [batch, heads, positions, head_dim].

    Before the first update `part` is None or has shape [0].
    """
    return part if part is None or part.dim() < 4 else part[:, :, :length]
