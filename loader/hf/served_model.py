"""Holds a served model's state beside its modules, and chooses the path of each forward pass.

The paths are the decoder and transformers' code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from loader.arithmetic.torch_threads import FEW_TOKENS, keep_threads_over_forks, torch_threads_for
from loader.decode.decoder import DecoderFactory
from loader.decode.decoder_call import is_single_token
from loader.decode.path_counters import LeaveDecoder, PathCounters, Reason
from loader.experts.cache import ExpertCache
from loader.experts.stats import MoeStats
from loader.hf.cache_length import cache_in, length_of, shorten
from loader.hf.decoder_path import DecoderPath
from loader.hf.generation_inputs import GenerationInputs
from loader.hf.growing_cache import growing_layers
from loader.hf.required_cache import with_8bit_cache

Forward = Callable[..., Any]


class Retry(Protocol):
    """Repeats a forward pass that ran out of memory (loader/cuda/experts/out_of_memory.py)."""

    def run(self, forward: Callable[[], Any]) -> Any:
        """Return the result of `forward`, which may be called several times."""


class Serving:
    """The expert cache, decoder and counters of one model. kv_bits: 8 or 16, of its KV caches.

    factory: makes the decoder; a LeaveDecoder is the reason why the model has none.
    retry: repeats passes that ran out of GPU memory; None for a model on the CPU.
    """

    def __init__(
        self,
        cache: ExpertCache,
        factory: DecoderFactory | LeaveDecoder,
        retry: Retry | None = None,
        kv_bits: int = 16,
    ) -> None:
        self.cache = cache
        self.kv_bits = kv_bits
        self.inputs = GenerationInputs()
        self._factory = factory
        self._retry = retry
        self._counters = PathCounters()
        self._path: DecoderPath | LeaveDecoder | None = (
            factory if isinstance(factory, LeaveDecoder) else None
        )
        keep_threads_over_forks()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Serving":
        """Return the state for a copy of the model: the same cache, a new decoder, new counters."""
        return Serving(self.cache, self._factory, self._retry, self.kv_bits)

    def stats(self) -> MoeStats:
        """Return a snapshot of the counters of the cache and of both paths."""
        return dataclasses.replace(
            self.cache.stats(), paths=self._counters.stats(), kv_bits=self.kv_bits
        )

    def reset_stats(self) -> None:
        """Set the counters to zero."""
        self.cache.reset_stats()
        self._counters.reset()

    def forward(
        self, model: Any, plain: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the output that `plain` gives for these arguments.

        plain: the forward method of transformers' class. A pass that raises an error leaves the KV
        cache at its former length.
        """
        if self.kv_bits == 8:
            args, kwargs = with_8bit_cache(model.config, args, kwargs)
        if torch.compiler.is_compiling():
            return plain(*args, **kwargs)
        if self._retry is None:
            return self._pass(model, plain, args, kwargs)
        return self._retry.run(lambda: self._pass(model, plain, args, kwargs))

    def _pass(
        self, model: Any, plain: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        past = cache_in(args, kwargs)
        length = length_of(past)
        try:
            try:
                result = self._decoder_path(model).run(args, kwargs)
                self._counters.count_decoded()
                return result
            except LeaveDecoder as e:
                # The traceback's frames would keep the tensors of this pass alive.
                left = e.with_traceback(None)
            tokens = _tokens(args, kwargs)
            if not is_single_token(args, kwargs):
                left = LeaveDecoder(Reason.PROMPT)
            self._counters.count_left(left, tokens)
            if past is not None:
                # The prompt's keys and values are appended in place too.
                growing_layers(past, model.config.num_hidden_layers, self.kv_bits)
            with torch_threads_for(tokens):
                return plain(*args, **kwargs)
        except BaseException:
            shorten(past, length)
            self.cache.release_interrupted()
            raise

    def _decoder_path(self, model: Any) -> DecoderPath:
        path = self._path
        if path is None:
            path = self._path = self._new_path(model)
        if isinstance(path, LeaveDecoder):
            raise path
        return path

    def _new_path(self, model: Any) -> DecoderPath | LeaveDecoder:
        if isinstance(self._factory, LeaveDecoder):
            return self._factory
        try:
            return DecoderPath(model, self._factory, self.kv_bits)
        except LeaveDecoder:
            # Not stored: a replaced module may be put back later.
            raise
        except Exception as e:
            return LeaveDecoder(Reason.FAILED, f"{type(e).__name__}: {e}")


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of tokens of a call; FEW_TOKENS + 1 if the arguments don't show it."""
    ids = args[0] if args else kwargs.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.numel()
    embeddings = kwargs.get("inputs_embeds")
    return embeddings.shape[:-1].numel() if isinstance(embeddings, Tensor) else FEW_TOKENS + 1
