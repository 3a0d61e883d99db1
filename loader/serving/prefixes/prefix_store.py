"""Prefix caches of finished answers for later prompts: an LRU bounded in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from loader.hf.eight_bit_layer import EightBitLayer
from loader.serving.prefixes.prefix_cache import PrefixCache, common_prefix

LEAST_COPIED = 16
"""Tokens. A shorter common prefix, such as a BOS token alone, is computed again, not copied."""


@dataclass(frozen=True)
class _Kept:
    """A prefix cache. Its first `prompt` tokens were the prompt."""

    cache: PrefixCache
    prompt: int
    n_bytes: int


class PrefixStore:
    """Prefix caches of at most `limit_bytes` in total; the least recently used is evicted first.

    Used by one thread; only `n_bytes` and `len` are safe from others.
    """

    def __init__(self, limit_bytes: int, model: Any) -> None:
        self.limit_bytes = limit_bytes
        self._model = model
        self._kept: list[_Kept] = []

    @property
    def n_bytes(self) -> int:
        """Total size of the prefix caches in bytes."""
        return sum(kept.n_bytes for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, prompt: Sequence[int]) -> tuple[PrefixCache, int]:
        """Return a prefix cache owned by the caller, and the number of prompt tokens it holds.

        That is at most all but the last token, which gives the logits. If the prompt continues a
        kept conversation, or its prompt, that cache is handed over. If it only shares a beginning,
        such as a system prompt, the common part is copied and both conversations keep a cache.
        """
        kept, common = self._best(prompt)
        goes_on = kept is not None and common >= min(kept.prompt, len(prompt) - 1)
        if kept is None or (not goes_on and common < LEAST_COPIED):
            return PrefixCache(self._model), 0
        self._kept.remove(kept)
        if not goes_on:
            self._kept.append(kept)
            return self._copy(kept.cache, common), common
        return kept.cache, kept.cache.begin(prompt)

    def keep(self, cache: PrefixCache, tokens: Sequence[int], prompt: int) -> None:
        """Keep `cache` as the most recently used.

        tokens: prompt and answer, whose first tokens the cache holds. prompt: length of the prompt.
        """
        cache.record(tokens)
        if not cache.tokens:
            return
        # Caches that are a prefix of this one have no more use.
        others = (
            kept
            for kept in self._kept
            if common_prefix(kept.cache.tokens, cache.tokens) < len(kept.cache.tokens)
        )
        self._kept = [*others, _Kept(cache, prompt, cache_bytes(cache.kv))]
        while self.n_bytes > self.limit_bytes:
            self._kept.pop(0)

    def _best(self, prompt: Sequence[int]) -> tuple[_Kept | None, int]:
        """Return the cache with the longest common prefix with the prompt, and that length."""
        best = None
        longest = 0
        for kept in self._kept:
            length = common_prefix(kept.cache.tokens, prompt[:-1])
            if length > longest and (
                length == len(kept.cache.tokens) or _can_be_cut(kept.cache.kv)
            ):
                best = kept
                longest = length
        return best, longest

    def _copy(self, cache: PrefixCache, length: int) -> PrefixCache:
        copy = PrefixCache(self._model)
        for number, layer in enumerate(cache.kv.layers):
            if isinstance(layer, EightBitLayer):
                copy.kv.layers[number : number + 1] = [layer.copied(length)]
                continue
            copy.kv.update(
                layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), number
            )
        copy.record(cache.tokens[:length])
        return copy


def cache_bytes(kv: Any) -> int:
    """Return the size of a transformers KV cache in bytes, including allocated room to grow."""
    tensors = (tensor for layer in kv.layers for tensor in _tensors(layer))
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)
    }
    return sum(storages.values())


def _tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, EightBitLayer):
        return list(layer.memory)
    values = (
        [layer.keys, layer.values]
        if isinstance(layer, DynamicLayer)
        else list(vars(layer).values())
    )
    return [value for value in values if isinstance(value, Tensor)]


def _can_be_cut(kv: Any) -> bool:
    """True if every layer holds the keys and values of all positions."""
    return all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in kv.layers)
