"""Measure a whole model on a GPU: tokens per second, also relative to the link's limit, and a
profile of a token's time.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_gaps import gaps, intervals_of

Row = dict[str, Any]
Load = Callable[..., Any]
"""Options of `from_pretrained` -> model."""

PAIRS: dict[str, tuple[Row, Row]] = {
    "prefetch": ({"prefetch": 0, "cpu_share": "off"}, {"prefetch": "auto", "cpu_share": "off"}),
    "prefetch, CPU share on": (
        {"prefetch": 0, "cpu_share": "auto"},
        {"prefetch": "auto", "cpu_share": "auto"},
    ),
    "CPU share": (
        {"prefetch": "auto", "cpu_share": "off"},
        {"prefetch": "auto", "cpu_share": "auto"},
    ),
}
"""What is compared: a without, b with it."""


class Stamps:
    """A streamer for generate that notes the time of each token.

    It calls `on_first` at the first token, which ends the prompt.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._on_first, self._prompt = on_first, True

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token, which is on the CPU."""
        if self._prompt:
            self._prompt = False
            return
        if not self.times:
            self._on_first()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called last."""


class Decoding:
    """A measurement: `prompt` random tokens, one new token, then `tokens` measured ones."""

    def __init__(self, tokens: int, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def run(self, model: Any, on_first: Callable[[], None] = lambda: None) -> Row:
        """Return tokens per second and the cache's counters per token."""
        ids = torch.randint(
            5, model.config.vocab_size, (1, self.prompt), generator=torch.Generator().manual_seed(0)
        ).to(model.device)

        def begin() -> None:
            model.reset_moe_stats()
            on_first()

        stamps = Stamps(begin)
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=self.tokens + 1,
                max_new_tokens=self.tokens + 1, do_sample=False, pad_token_id=0, streamer=stamps,
            )  # fmt: skip
        stats = model.moe_stats()
        total = stats.total
        return {
            "tokens_per_s": self.tokens / (stamps.times[-1] - stamps.times[0]),
            "misses_per_token": total.misses / self.tokens,
            "cpu_experts_per_token": total.cpu_experts / self.tokens,
            "link_bytes_per_token": (total.bytes_read + total.wasted_bytes) / self.tokens,
            "hit_ratio": total.hit_ratio,
            "recall": total.recall,
            # Fewer than asked for where memory ran out.
            "least_slots": min(stats.slots),
        }


def share_of_link(row: Row, link_bytes_per_s: float, expert_bytes: int) -> float | None:
    """Return tokens per second relative to the link's limit; None without misses.

    The limit is `link / (misses per token · bytes per expert)`. With a CPU share the result may be
    above 1: experts that the CPU computes do not use the link.
    """
    bytes_per_token = row["misses_per_token"] * expert_bytes
    return row["tokens_per_s"] * bytes_per_token / link_bytes_per_s if bytes_per_token else None


def compare(
    load: Load, decoding: Decoding, slots: list[int], names: list[str], expert_bytes: int,
    link_bytes_per_s: Callable[[], float], rounds: int,
) -> Iterator[Row]:  # fmt: skip
    """Yield a row for each pair in `names`, with `slots` in each layer.

    Both models of a pair are loaded and run in turn; the link is measured before.
    """
    for name in names:
        link = link_bytes_per_s()
        runs = _in_turn(
            load, decoding, [{"slots": slots, **options} for options in PAIRS[name]], rounds
        )
        gc.collect()
        ratios = [with_it["tokens_per_s"] / without["tokens_per_s"] for without, with_it in runs]
        row: Row = {
            "pair": name,
            "slots": slots[0],
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        for side, options, found in zip("ab", PAIRS[name], zip(*runs, strict=True), strict=True):
            medians = {key: statistics.median(run[key] for run in found) for key in found[0]}
            shares = [share_of_link(run, link, expert_bytes) for run in found]
            known = [share for share in shares if share is not None]
            row[side] = (
                options | medians | {"share_of_link": statistics.median(known) if known else None}
            )
        yield row | {"link_gb_s": link / 1e9}


def _in_turn(load: Load, decoding: Decoding, options: list[Row], rounds: int) -> list[list[Row]]:
    """Run models with these options in turn, all loaded; the first round is not counted."""
    with ExitStack() as stack:
        models = [stack.enter_context(loaded(load, **each)) for each in options]
        return [[decoding.run(model) for model in models] for _ in range(rounds + 1)][1:]


def profile(
    model: Any, decoding: Decoding, activity: Any = torch.profiler.ProfilerActivity.CUDA
) -> list[Row]:
    """Return rows of gaps by layer while tokens are decoded under the profiler.

    The profiler costs time. So the row of the whole token also has `idle_share_plain`: the idle
    share without the profiler, computed with the busy time under it.
    """
    decoding.run(model)
    plain_us = 1e6 / decoding.run(model)["tokens_per_s"]
    profiler = torch.profiler.profile(activities=[activity])
    decoding.run(model, profiler.start)
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        intervals = intervals_of(json.loads(file.read_text()))
    rows = gaps(intervals, model.config.num_hidden_layers)
    if rows:
        whole = rows[-1]
        whole |= {
            "plain_us": plain_us,
            "idle_share_plain": max(0.0, 1 - (whole["us"] - whole["idle_us"]) / plain_us),
        }
    return rows


def token_bytes(model: Any, expert_bytes: int) -> int:
    """Return the bytes of experts, attention and head that one token reads."""
    config, head = model.config, model.lm_head
    packed = sum(
        buffer.numel() for name, buffer in model.named_buffers() if name.endswith(".packed")
    )
    plain = head.weight.numel() * head.weight.element_size() if hasattr(head, "weight") else 0
    return int(
        config.num_hidden_layers * config.num_experts_per_tok * expert_bytes + packed + plain
    )


def resident(
    model: Any, decoding: Decoding, expert_bytes: int, copy_gb_s: float, rounds: int
) -> Row:
    """Return the speed with every expert on the GPU; GB/s count the weights that a token reads."""
    runs = [decoding.run(model) for _ in range(rounds + 1)][1:]
    tokens_per_s = statistics.median(run["tokens_per_s"] for run in runs)
    rate = tokens_per_s * token_bytes(model, expert_bytes) / 1e9
    return {
        "tokens_per_s": tokens_per_s,
        "ms_per_layer": 1e3 / tokens_per_s / model.config.num_hidden_layers,
        "gb_s": rate,
        "copy_gb_s": copy_gb_s,
        "share": rate / copy_gb_s,
        "misses_per_token": statistics.median(run["misses_per_token"] for run in runs),
    }


@contextmanager
def loaded(load: Load, **options: Any) -> Iterator[Any]:
    """Yield a model, and free its page-locked RAM afterwards.

    Its GPU memory is freed when the model is collected.
    """
    model = load(**options)
    try:
        yield model
    finally:
        model.model.layers[0].mlp.experts.cache.close()
