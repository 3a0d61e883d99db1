"""Undocumented names of transformers that only some releases have. No other file of the loader uses
them.

Each name is looked up once. In a release without it transformers' own code does the work, and a log
line names the slower operation.
"""

import functools
import inspect
import logging
from typing import Any

import transformers
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

_log = logging.getLogger(__name__)

RECORDER_MODULE = "transformers.utils.output_capturing"
"""The module of transformers' recording hooks."""


@functools.cache
def active_collector() -> Any:
    """Return the context variable that is set while transformers records outputs, or None."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        _log_slow_path("after a call that records outputs, single tokens take transformers' code")
        return None
    return _active_collector


@functools.cache
def generation_methods() -> tuple[Any, Any] | None:
    """Return GenerationMixin's two methods that prepare a token; None if their arguments differ from
    those that `GenerationInputs` handles.
    """
    prepare = getattr(GenerationMixin, "prepare_inputs_for_generation", None)
    update = getattr(GenerationMixin, "_update_model_kwargs_for_generation", None)
    # Earlier releases call the cache past_key_values, and prepare cache_position too.
    for method, needed in (
        (prepare, {"next_sequence_length", "cache"}),
        (update, {"num_new_tokens"}),
    ):
        if method is None or not needed <= inspect.signature(method).parameters.keys():
            _log_slow_path("generate copies mask and positions for each token")
            return None
    return prepare, update


def attention_implementation(config: Any) -> Any:
    """Return config._attn_implementation. Bypasses its property, which takes 5 µs, if possible."""
    try:
        return object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        return config._attn_implementation


def experts_implementation(config: Any) -> Any:
    """Return a configuration's choice among transformers' expert implementations, or None."""
    return getattr(config, "_experts_implementation_internal", None)


@functools.cache
def cache_field() -> str:
    """Return the name of the KV cache in a model's output and arguments: `cache` since transformers
    5.24, `past_key_values` before.
    """
    return (
        "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
    )


def _log_slow_path(consequence: str) -> None:
    """Log the consequence of a missing name. Each caller is cached, so it logs once a process."""
    _log.info("transformers %s: %s", transformers.__version__, consequence)
