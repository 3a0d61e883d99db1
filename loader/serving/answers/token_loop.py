"""The engine's token loop: one forward pass per token, over a KV cache that the caller owns."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from loader.hf.private_names import cache_field
from loader.serving.answers.events import TokenLogprob
from loader.serving.answers.sampler import Sampler

PROMPT_PART = 1024
"""Prompt tokens computed in one pass. More would need more memory for activations; fewer would read
the same experts more often.
"""


class CancelledError(Exception):
    """The generation was cancelled."""


def generate_tokens(
    model: Any,
    tokens: Sequence[int],
    cache: Any,
    sampler: Sampler,
    is_cancelled: Callable[[], bool],
) -> Iterator[TokenLogprob]:
    """Yield the tokens after `tokens`, without end; the caller stops the iteration.

    cache: transformers' KV cache of the first of `tokens`, fewer than all; it grows with each pass.
    CancelledError within one token after `is_cancelled` returns True.
    """
    tokens = list(tokens)
    while True:
        logits = _logits(model, tokens, cache, is_cancelled)
        if is_cancelled():
            raise CancelledError
        chosen = sampler.choose(logits, tokens)
        tokens.append(chosen.token)
        yield chosen


def _logits(model: Any, tokens: list[int], cache: Any, is_cancelled: Callable[[], bool]) -> Any:
    """Compute tokens that the cache lacks. Return the last position's logits [vocabulary]."""
    begin = cache.get_seq_length()
    while True:
        if is_cancelled():
            raise CancelledError
        end = min(begin + PROMPT_PART, len(tokens))
        ids = torch.tensor([tokens[begin:end]], device=model.device)
        # Without a mask every position attends to all earlier ones.
        arguments: dict[str, Any] = {cache_field(): cache}
        with (
            _cancelled_between_layers(model, is_cancelled)
            if end - begin > 1
            else contextlib.nullcontext()
        ):
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **arguments)
        begin = end
        if begin == len(tokens):
            return output.logits[0, -1]


@contextlib.contextmanager
def _cancelled_between_layers(model: Any, is_cancelled: Callable[[], bool]) -> Iterator[None]:
    """Let a pass over a long prompt, which may take minutes, end before its next layer.

    If a pass is aborted, the model cuts the KV cache back to its former length.
    """

    def check(*_: Any) -> None:
        if is_cancelled():
            raise CancelledError

    hooks = [layer.register_forward_pre_hook(check) for layer in model.get_decoder().layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
