"""The KV cache of a forward pass that was not finished: its former length, the same in each layer."""

import logging
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

_log = logging.getLogger(__name__)


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The plain KV cache among the arguments of a model's forward, or None."""
    past = args[3] if len(args) > 3 else kwargs.get("cache", kwargs.get("past_key_values"))
    return past if isinstance(past, DynamicCache) else None


def length_of(cache: Any) -> int:
    """Positions that every layer holds before a pass."""
    return cache.get_seq_length() if cache is not None else 0


def shorten(cache: Any, length: int) -> None:
    """Gives each layer of the cache its former length back."""
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, DynamicLayer) and not layer.is_sliding:
            # Not by crop: the keys may have come, and the values not.
            layer.keys, layer.values = _first(layer.keys, length), _first(layer.values, length)
        elif (added := layer.get_seq_length() - length) > 0:
            try:
                # Later versions of transformers take no length, all take what is to go as a
                # negative number.
                layer.crop(-added) if length else layer.reset()
            except (RuntimeError, ValueError) as e:
                # A sliding window has dropped what would have to come back.
                _log.warning("the KV cache cannot be used again, begin with the whole text: %s", e)
                return


def _first(part: Any, length: int) -> Any:
    """The first positions of keys or values [batch, heads, positions, width], which before the
    first are None or [].
    """
    return part if part is None or part.dim() < 4 else part[:, :, :length]
