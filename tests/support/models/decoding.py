"""Single tokens through a served model, by the decoder or by transformers' code."""

from contextlib import contextmanager

import torch
from transformers import DynamicCache

from loader.hf.private_names import cache_field

IDS = torch.arange(7, 47)[None]
NAME = cache_field()


def prompted(model, ids):
    """A cache that holds `ids`."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, **{NAME: cache}, use_cache=True)
    return cache


def token_by_token(model, cache=None, ids=IDS, begin=None, **options):
    """Return the outputs of the tokens of `ids` from `begin` on, one by one.

    They follow a prompt of the tokens before, or `cache`.
    """
    begin = (ids.shape[1] // 2 if cache is None else 0) if begin is None else begin
    cache = prompted(model, ids[:, :begin]) if cache is None else cache
    return [
        model(part, **{NAME: cache}, use_cache=True, **options)
        for part in ids[:, begin:].split(1, 1)
    ]


def logits(steps):
    return torch.cat([step.logits for step in steps], 1)


def paths(model, run):
    """Return the decoder's count and the reasons' counts for `run`, without its prompts."""
    before = model.moe_stats().paths
    run()
    after = model.moe_stats().paths
    reasons = {name: count - before.reasons.get(name, 0) for name, count in after.reasons.items()}
    reasons.pop("prompt", None)
    return after.decoder - before.decoder, {name: count for name, count in reasons.items() if count}


@contextmanager
def transformers_code(model):
    """Let transformers' code compute single tokens inside the context; a hook causes that."""
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def rms_difference(ours, expected):
    """Root mean square of the difference, in standard deviations of `expected`."""
    return float((ours.float() - expected.float()).square().mean().sqrt() / expected.float().std())


ROUNDING = {torch.float32: 0.01, torch.bfloat16: 0.05}
"""The difference of logits that rounding makes: last bits of activations turn roundings to int8 in
the next layers.
"""
