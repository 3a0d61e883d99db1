"""Prefix caches of finished answers, for prompts that begin with the same tokens: an LRU bounded in
bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from loader.serving.prefixes.prefix_cache import PrefixCache, common_prefix

LEAST_COPIED = 16
"""Tokens: a common beginning of fewer, such as a BOS token alone, is computed anew."""


@dataclass(frozen=True)
class _Kept:
    """A prefix cache whose first `prompt` tokens were a prompt."""

    cache: PrefixCache
    prompt: int
    n_bytes: int


class PrefixStore:
    """Prefix caches of at most `limit_bytes` together; the least recently used goes first. For one
    thread, but for `n_bytes` and `len`.
    """

    def __init__(self, limit_bytes: int, model: Any) -> None:
        self.limit_bytes = limit_bytes
        self._model = model
        self._kept: list[_Kept] = []

    @property
    def n_bytes(self) -> int:
        """Memory of the prefix caches."""
        return sum(kept.n_bytes for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, prompt: Sequence[int]) -> tuple[PrefixCache, int]:
        """Return a prefix cache that the caller owns, and how many of the prompt's first tokens it
        holds: all but one at most, since the last gives the logits.

        One that the prompt continues, or whose prompt the prompt continues, is handed over. Of
        another one that begins alike, as with a common system prompt, the common part is copied:
        both conversations keep theirs.
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
        """Keeps `cache`, which holds keys and values of the first of `tokens`, of which `prompt`
        were the prompt, as the most recently used.
        """
        cache.record(tokens)
        if not cache.tokens:
            return
        # Those that this one continues are of no more use.
        others = (
            kept
            for kept in self._kept
            if common_prefix(kept.cache.tokens, cache.tokens) < len(kept.cache.tokens)
        )
        self._kept = [*others, _Kept(cache, prompt, cache_bytes(cache.kv))]
        while self.n_bytes > self.limit_bytes:
            self._kept.pop(0)

    def _best(self, prompt: Sequence[int]) -> tuple[_Kept | None, int]:
        """The one with the most tokens of the prompt, and how many."""
        best, most = None, 0
        for kept in self._kept:
            length = common_prefix(kept.cache.tokens, prompt[:-1])
            if length > most and (length == len(kept.cache.tokens) or _can_be_cut(kept.cache.kv)):
                best, most = kept, length
        return best, most

    def _copy(self, cache: PrefixCache, length: int) -> PrefixCache:
        copy = PrefixCache(self._model)
        for number, layer in enumerate(cache.kv.layers):
            copy.kv.update(
                layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), number
            )
        copy.record(cache.tokens[:length])
        return copy


def cache_bytes(kv: Any) -> int:
    """Return the memory of a KV cache of transformers, with the room to grow that its layers have."""
    tensors = (tensor for layer in kv.layers for tensor in _tensors(layer))
    storages = {
        storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)
    }
    return sum(storages.values())


def _tensors(layer: Any) -> list[Tensor]:
    values = (
        [layer.keys, layer.values]
        if isinstance(layer, DynamicLayer)
        else list(vars(layer).values())
    )
    return [value for value in values if isinstance(value, Tensor)]


def _can_be_cut(kv: Any) -> bool:
    """True if each layer has the keys and values of all positions."""
    return all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in kv.layers)
