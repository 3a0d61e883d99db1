"""All uses of transformers' private names (with a leading underscore) in the loader.

Some releases lack some of them. Each of these is looked up once: without it transformers' own code
does the work, and a log line names the slower operation.

transformers is imported inside functions only. The plugin imports this file while transformers is
still being imported (loader/hf/by_name/registration.py), so an import here would close a circle.
"""

import functools
import inspect
import logging
from typing import Any, TypeVar

from torch import nn

Quantizer = TypeVar("Quantizer")

_log = logging.getLogger(__name__)

RECORDER_MODULE = "transformers.utils.output_capturing"
"""The module of transformers' recording hooks."""

UPDATE_METHOD = "_update_model_kwargs_for_generation"
"""Name of the method by which generate extends mask and positions after a token."""

BEFORE_WEIGHTS_METHOD = "_process_model_before_weight_loading"
"""Name of the quantizer's method that gets the model before its weights are loaded."""

COMMIT_HASH = "_commit_hash"
"""Name of the argument, and of the configuration's attribute, with the commit of a Hub repository.

transformers 5.24 no longer sets it.
"""

INTERNAL_ARGUMENTS = frozenset({"_from_auto", "_from_pipeline", "_fast_init"})
"""Arguments that transformers' Auto classes and pipelines pass to from_pretrained."""


def replaces_modules(quantizer: type[Quantizer]) -> type[Quantizer]:
    """Make transformers call `replace_modules(model)` of a quantizer before weights are loaded.

    A class decorator for subclasses of HfQuantizer. The model is on the meta device.
    """

    def process(self: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.replace_modules(model)
        return model

    setattr(quantizer, BEFORE_WEIGHTS_METHOD, process)
    return quantizer


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
    """Return GenerationMixin's two methods that prepare a token.

    None if their parameters differ from those that `GenerationInputs` handles.
    """
    from transformers.generation import GenerationMixin

    prepare = getattr(GenerationMixin, "prepare_inputs_for_generation", None)
    update = getattr(GenerationMixin, UPDATE_METHOD, None)
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


def returns_attentions(config: Any) -> bool:
    """True if the configuration asks for attention weights in every output."""
    # A configuration's own attribute lookup costs 1 to 5 µs.
    return bool(object.__getattribute__(config, "__dict__").get("_output_attentions"))


def experts_implementation(config: Any) -> Any:
    """Return a configuration's choice among transformers' expert implementations, or None."""
    return getattr(config, "_experts_implementation_internal", None)


def commit_hash(config: Any) -> str | None:
    """Return the commit from which a configuration was loaded, or None."""
    return getattr(config, COMMIT_HASH, None)


def supports_sdpa(model_class: Any) -> bool:
    """True if a model class can use torch's scaled_dot_product_attention."""
    return bool(model_class._supports_sdpa)


def skip_initialization(module: nn.Module) -> None:
    """Stop transformers from giving random values to the module's `weight`."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def ignore_unexpected(model: nn.Module, pattern: str) -> None:
    """Accept tensors in the file whose name matches the regular expression `pattern`.

    Without it transformers logs a warning for tensors that the model lacks.
    """
    present = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns: Any = _Patterns([*present, pattern])
    model._keys_to_ignore_on_load_unexpected = patterns


class _Patterns(list[str]):
    """A list that is also joined with a set: transformers 5.0 adds a list, later releases a set."""

    def __or__(self, other: Any) -> set[str]:
        return {*self, *other}

    __ror__ = __or__


@functools.cache
def cache_field() -> str:
    """Return the name of the KV cache in a model's output and arguments.

    It is `cache` since transformers 5.24, `past_key_values` before.
    """
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    fields = MoeCausalLMOutputWithPast.__dataclass_fields__
    return "cache" if "cache" in fields else "past_key_values"


def _log_slow_path(consequence: str) -> None:
    """Log the consequence of a missing name. Each caller is cached, so it logs once a process."""
    import transformers

    _log.info("transformers %s: %s", transformers.__version__, consequence)
