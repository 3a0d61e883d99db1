"""Decodes a few tokens with a converted folder, to compare with a plan."""

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loader.model import from_pretrained


@dataclass(frozen=True)
class TrialRun:
    """Speed, hit ratio and bytes read on misses of `tokens` decoded tokens."""

    tokens: int
    tokens_per_s: float
    hit_ratio: float
    read_bytes_per_token: float


def try_out(
    folder: Path,
    ram_cache: int,
    gpu_cache: int | None = None,
    *,
    prompt: int,
    tokens: int = 32,
    policy: str = "lrfu",
    check: str = "fast",
    kv_bits: int = 16,
) -> TrialRun:
    """Decode `tokens` greedily after a prompt of random tokens, which fills the slots.

    ram_cache, gpu_cache: budgets in bytes; with gpu_cache None the model runs on the CPU.
    Raises the errors of `from_pretrained`.
    """
    options = {"device": "cpu"} if gpu_cache is None else {"device": "cuda", "gpu_cache": gpu_cache}
    try:
        return _decode(
            folder,
            prompt,
            tokens,
            {
                **options,
                "ram_cache": ram_cache,
                "policy": policy,
                "check": check,
                "kv_bits": kv_bits,
            },
        )
    finally:
        # Modules refer to each other: without a collection, two caches would be in memory.
        gc.collect()


def _decode(folder: Path, prompt: int, tokens: int, options: dict[str, Any]) -> TrialRun:
    model: Any = from_pretrained(folder, **options)
    ids = torch.randint(
        model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(model.device)
    clock = _Clock(model)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens + 1,
            max_new_tokens=tokens + 1,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            streamer=clock,
        )
    seconds = time.perf_counter() - clock.begin_s
    total = model.moe_stats().total
    return TrialRun(tokens, tokens / seconds, total.hit_ratio, total.bytes_read / tokens)


class _Clock:
    """A streamer that starts the clock at the first new token."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._calls = 0
        self.begin_s = 0.0

    def put(self, value: Any) -> None:
        self._calls += 1
        if self._calls == 2:  # the first brings the prompt
            self._model.reset_moe_stats()
            self.begin_s = time.perf_counter()

    def end(self) -> None:
        pass
