"""Makes sure that a call of a model with kv_bits 8 has a KV cache in 8 bits."""

from typing import Any

from transformers.cache_utils import DynamicCache

from formats.errors import MoeConvertError
from loader.hf.growing_cache import growing_layers
from loader.hf.private_names import cache_field

_HINT = "pass transformers' DynamicCache, or load the model with kv_bits=16"


def with_8bit_cache(
    config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a model's forward with a cache whose layers are in 8 bits.

    Without a cache they get a new one, unless `use_cache` is false: transformers would make one in
    16 bits. Raises MoeConvertError for another kind of cache.
    """
    names = [name for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
    given = [kwargs[name] for name in names] + [arg for arg in args[3:4] if arg is not None]
    if not given:
        use_cache = kwargs.get("use_cache")
        if config.use_cache if use_cache is None else use_cache:
            new = _new_cache(config)
            if len(args) > 3:
                return (*args[:3], new, *args[4:]), kwargs
            return args, {**kwargs, cache_field(): new}
        return args, kwargs
    if growing_layers(given[0], config.num_hidden_layers, 8) is None:
        raise MoeConvertError(
            f"kv_bits: this {type(given[0]).__name__} cannot hold 8 bits: it is no DynamicCache,"
            " or its layers are not plain, are offloaded, or differ in length",
            _HINT,
        )
    return args, kwargs


def window_arguments(model: Any) -> dict[str, Any]:
    """Return the arguments for a forward pass over a whole text, of the model or its inner model.

    No KV cache is needed, unless it has 8 bits: then its rounding is part of the result.
    """
    if getattr(model, "kv_bits", 16) != 8:
        return {"use_cache": False}
    return {"use_cache": True, cache_field(): _new_cache(model.config)}


def _new_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    growing_layers(cache, config.num_hidden_layers, 8)
    return cache
