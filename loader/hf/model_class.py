"""The class of a served model: a subclass of the family's causal model, made once for each family."""

import functools
from typing import Any

from loader.experts.stats import MoeStats
from loader.hf.model_size import packed_weights
from loader.hf.private_names import generation_methods
from loader.hf.served_model import Serving


class MoeConvertMixin:
    """The methods that a served model has besides those of its transformers class."""

    _serving: Serving

    def serve(self, serving: Serving) -> None:
        """Give the loaded model its cache, decoder and counters. Once, before the first forward
        pass.
        """
        self._serving = serving

    def moe_stats(self) -> MoeStats:
        """Return a snapshot of what the expert cache and the paths of tokens counted."""
        return self._serving.stats()

    def reset_moe_stats(self) -> None:
        """Set all counters of `moe_stats` to zero; the cache keeps its experts."""
        self._serving.reset_stats()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters of the model that was converted: of packed weights and
        experts too.
        """
        counted: int = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        return counted if only_trainable else counted + packed_weights(self)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes that the trunk takes and that the experts' cache may take, in RAM and on
        GPUs.
        """
        trunk: int = super().get_memory_footprint(return_buffers)  # type: ignore[misc]
        stats = self.moe_stats()
        return trunk + stats.slot_bytes + (stats.ram.buffer_bytes if stats.ram else 0)


def served_class(base: Any) -> Any:
    """Return the subclass of `base`, a causal model of transformers, whose experts come from a
    cache.

    base: the class, or what stands for it in transformers' registry. The subclass has its name and
    module: transformers reads both, for losses, pipelines and attention implementations.
    """
    # Of a RegistryEntry, the class that it stands for.
    return _made_once(getattr(base, "plain_class", base))


@functools.cache
def _made_once(base: Any) -> Any:

    class Served(MoeConvertMixin, base):  # type: ignore[misc]
        def __reduce_ex__(self, protocol: Any) -> Any:
            """By `base`: no module has this class under its name. Pickling then reaches the cache,
            which refuses.
            """
            return _blank, (base,), self.__dict__

        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._serving.forward(self, super().forward, args, kwargs)

        if generation_methods() is not None:

            @functools.wraps(base.prepare_inputs_for_generation)
            def prepare_inputs_for_generation(
                self, input_ids: Any, *args: Any, **kwargs: Any
            ) -> Any:
                inputs = self._serving.inputs.prepared(input_ids, args, kwargs)
                return (
                    super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
                    if inputs is None
                    else inputs
                )

            @functools.wraps(base._update_model_kwargs_for_generation)
            def _update_model_kwargs_for_generation(
                self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any
            ) -> Any:
                updated = self._serving.inputs.updated(outputs, model_kwargs, args, kwargs)
                if updated is None:
                    return super()._update_model_kwargs_for_generation(
                        outputs, model_kwargs, *args, **kwargs
                    )
                return updated

    Served.__name__, Served.__qualname__, Served.__module__ = (
        base.__name__,
        base.__qualname__,
        base.__module__,
    )
    Served.__doc__ = base.__doc__
    return Served


def _blank(base: Any) -> Any:
    """Return an object of `served_class(base)` without state, for copies."""
    served = served_class(base)
    return served.__new__(served)
