"""Names inside transformers that only some of its releases have: the one file of the loader that
uses them.

Each is looked up once. In a release without it transformers' own code does the work, and a log line
says what is slower.
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
    """The context variable that is set while transformers records outputs, or None."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        _say("once outputs were recorded, single tokens take transformers' code")
        return None
    return _active_collector


@functools.cache
def generation_methods() -> tuple[Any, Any] | None:
    """GenerationMixin's two methods that prepare a token, where they take the arguments that we
    prepare; or None.
    """
    prepare = getattr(GenerationMixin, "prepare_inputs_for_generation", None)
    update = getattr(GenerationMixin, "_update_model_kwargs_for_generation", None)
    # Earlier releases say past_key_values for cache, and prepare cache_position too.
    for method, needed in (
        (prepare, {"next_sequence_length", "cache"}),
        (update, {"num_new_tokens"}),
    ):
        if method is None or not needed <= inspect.signature(method).parameters.keys():
            _say("generate copies mask and positions for each token")
            return None
    return prepare, update


def attention_implementation(config: Any) -> Any:
    """config._attn_implementation, where possible without the Python that its property runs through
    (5 µs).
    """
    try:
        return object.__getattribute__(config, "_attn_implementation_internal")
    except AttributeError:
        return config._attn_implementation


def experts_implementation(config: Any) -> Any:
    """The choice of transformers' own experts in a configuration, None where none was made."""
    return getattr(config, "_experts_implementation_internal", None)


@functools.cache
def cache_field() -> str:
    """The name of the KV cache in a model's output and arguments: `cache` since 5.24, before
    `past_key_values`.
    """
    return (
        "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
    )


def _say(what_is_slower: str) -> None:
    _log.info("transformers %s: %s", transformers.__version__, what_is_slower)
