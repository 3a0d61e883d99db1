"""Names inside transformers that fast paths need and that only some of its releases have.

Each is looked up here, once. In a release without it transformers' own code does the work, and a log line says what is
slower.
"""

import functools
import inspect
import logging
from typing import Any

import transformers
from transformers.generation import GenerationMixin

_log = logging.getLogger(__name__)


@functools.cache
def active_collector() -> Any:
    """The context variable that is set while transformers records outputs, or None."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        _say("once outputs were recorded, each module is called for single tokens")
        return None
    return _active_collector


@functools.cache
def generation_methods() -> tuple[Any, Any] | None:
    """GenerationMixin's two methods that prepare a token, where they take the arguments that we prepare; or None."""
    prepare = getattr(GenerationMixin, "prepare_inputs_for_generation", None)
    update = getattr(GenerationMixin, "_update_model_kwargs_for_generation", None)
    # Earlier releases say past_key_values for cache, and prepare cache_position too.
    for method, needed in ((prepare, {"next_sequence_length", "cache"}), (update, {"num_new_tokens"})):
        if method is None or not needed <= inspect.signature(method).parameters.keys():
            _say("generate copies mask and positions for each token")
            return None
    return prepare, update


def _say(what_is_slower: str) -> None:
    _log.info("transformers %s: %s", transformers.__version__, what_is_slower)
