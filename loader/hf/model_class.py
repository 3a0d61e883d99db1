"""Makes the class of a served model: a subclass of the family's causal model, one per family."""

import functools
from typing import Any

from loader.experts.stats import MoeStats
from loader.hf.model_size import packed_weights
from loader.hf.private_names import UPDATE_METHOD, generation_methods
from loader.hf.served_model import Serving


class MoeConvertMixin:
    """Methods that a served model adds to its transformers class."""

    _serving: Serving

    def serve(self, serving: Serving) -> None:
        """Set the model's cache, decoder and counters. Call once, before the first forward pass."""
        self._serving = serving

    def moe_stats(self) -> MoeStats:
        """Return a snapshot of the expert cache's counters and of the tokens on each path."""
        return self._serving.stats()

    @property
    def kv_bits(self) -> int:
        """Bits of a number in the model's KV caches: 8, or 16 for the model's dtype."""
        return self._serving.kv_bits

    def reset_moe_stats(self) -> None:
        """Set all counters of `moe_stats` to zero; the cache keeps its experts."""
        self._serving.reset_stats()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, equal to that of the unconverted model.

        It includes packed weights and all experts. only_trainable: leave both out, they are frozen.
        """
        counted: int = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        return counted if only_trainable else counted + packed_weights(self)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the size in bytes of the trunk and of the expert cache's memory, RAM and GPUs."""
        trunk: int = super().get_memory_footprint(return_buffers)  # type: ignore[misc]
        stats = self.moe_stats()
        return trunk + stats.slot_bytes + (stats.ram.buffer_bytes if stats.ram else 0)


def served_class(base: Any) -> Any:
    """Return the subclass of `base` that reads its experts from a cache.

    base: a causal model class of transformers, or its RegistryEntry. The subclass has the same name
    and module: transformers looks up losses, pipelines and attention implementations by both.
    """
    # A RegistryEntry has the real class in `plain_class`.
    return _subclass(getattr(base, "plain_class", base))


@functools.cache
def _subclass(base: Any) -> Any:
    class Served(MoeConvertMixin, base):  # type: ignore[misc]
        def __reduce_ex__(self, protocol: Any) -> Any:
            """Copy through `_blank`, because no module has this class under its name.

            Pickling then reaches the expert cache, which raises an error.
            """
            return _blank, (base,), self.__dict__

        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._serving.forward(self, super().forward, args, kwargs)

    if generation_methods() is not None:
        prepare = _prepare_method(base.prepare_inputs_for_generation)
        Served.prepare_inputs_for_generation = prepare  # type: ignore[attr-defined]
        setattr(Served, UPDATE_METHOD, _update_method(getattr(base, UPDATE_METHOD)))
    Served.__name__ = base.__name__
    Served.__qualname__ = base.__qualname__
    Served.__module__ = base.__module__
    Served.__doc__ = base.__doc__
    return Served


def _prepare_method(plain: Any) -> Any:
    """Return the method that prepares a token without copies, or else calls `plain`."""

    @functools.wraps(plain)
    def prepare(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._serving.inputs.prepared(input_ids, args, kwargs)
        return plain(self, input_ids, *args, **kwargs) if inputs is None else inputs

    return prepare


def _update_method(plain: Any) -> Any:
    """Return the method that extends mask and positions in place, or else calls `plain`."""

    @functools.wraps(plain)
    def update(self: Any, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        updated = self._serving.inputs.updated(outputs, model_kwargs, args, kwargs)
        if updated is None:
            return plain(self, outputs, model_kwargs, *args, **kwargs)
        return updated

    return update


def _blank(base: Any) -> Any:
    """Return an object of `served_class(base)` without state. Copies and unpickling fill it."""
    served = served_class(base)
    return served.__new__(served)
