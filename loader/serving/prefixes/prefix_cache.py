"""A KV cache kept between prompts, with the tokens it holds."""

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicCache

from loader.hf.cache_length import shorten


class PrefixCache:
    """KV cache of one conversation. For a prompt with the same first tokens as the last one, only
    the new tokens are computed.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self._tokens: list[int] = []
        self.kv = DynamicCache(config=self._config)
        """transformers' KV cache of `tokens`."""

    @property
    def tokens(self) -> Sequence[int]:
        """Tokens whose keys and values are in the cache."""
        return self._tokens

    def clear(self) -> None:
        """Forget everything."""
        self._tokens = []
        self.kv = DynamicCache(config=self._config)

    def begin(self, prompt: Sequence[int]) -> int:
        """Shorten the cache to its common prefix with `prompt` and return the prefix's length.

        The prompt's last token is never part of the prefix: its logits are needed.
        """
        held = min((int(layer.get_seq_length()) for layer in self.kv.layers), default=0)
        # An interrupt may have come after the cache was cut and before `_tokens` was.
        common = min(common_prefix(self._tokens, prompt), held, len(prompt) - 1)
        if common == 0 or not self._shorten(common):
            self.clear()
            return 0
        self._tokens = list(prompt[:common])
        return common

    def record(self, tokens: Sequence[int]) -> None:
        """Record that the cache holds the first of `tokens`, as many as the model has computed.

        Also correct after an interrupt.
        """
        lengths = {int(layer.get_seq_length()) for layer in self.kv.layers}
        length = lengths.pop() if len(lengths) == 1 else 0
        if lengths or length == 0 or not self._shorten(min(length, len(tokens))):
            self.clear()
            return
        self._tokens = list(tokens[:length])

    def _shorten(self, length: int) -> bool:
        """Cut the cache to `length`. False if a full sliding window has already dropped tokens that
        are needed again.
        """
        longer = [layer for layer in self.kv.layers if layer.get_seq_length() > length]
        for layer in longer:
            if (
                getattr(layer, "is_sliding", False)
                and layer.get_seq_length() >= layer.sliding_window
            ):
                return False
        if longer:
            shorten(self.kv, length)
        return True


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two token sequences."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
