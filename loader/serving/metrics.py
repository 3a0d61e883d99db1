"""Counters of a server as Prometheus text."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

PREFIX = "moe_convert"


class Metrics:
    """Counts requests, tokens and seconds. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()
        self._responses: Counter[tuple[str, int]] = Counter()

    def add(self, name: str, amount: float = 1) -> None:
        """Adds to the counter `name`, one of COUNTERS."""
        if name not in COUNTERS:
            raise KeyError(name)
        with self._lock:
            self._values[name] += amount  # type: ignore[assignment]

    def count_response(self, route: str, status: int) -> None:
        """Counts one answer of HTTP."""
        with self._lock:
            self._responses[route, status] += 1

    def value(self, name: str) -> float:
        """Return a counter's present value."""
        with self._lock:
            return self._values[name]

    def text(self, gauges: dict[str, float], experts: Any) -> str:
        """Return the page. gauges: values of GAUGES. experts: totals of the expert cache
        (`LayerStats`).
        """
        with self._lock:
            values, responses = dict(self._values), dict(self._responses)
        lines: list[str] = []
        for name, text in COUNTERS.items():
            lines += _metric(f"{name}_total", "counter", text, values.get(name, 0))
        lines += _head("http_responses_total", "counter", "Answers of HTTP by route and status")
        for (route, status), count in sorted(responses.items()):
            lines.append(
                f'{PREFIX}_http_responses_total{{route="{route}",status="{status}"}} {count}'
            )
        for name, text in GAUGES.items():
            lines += _metric(name, "gauge", text, gauges[name])
        for name, kind, text, value in _of_experts(experts):
            lines += _metric(name, kind, text, value)
        return "\n".join(lines) + "\n"


COUNTERS = {
    "prompt_tokens": "Tokens of the prompts whose generation began",
    "prompt_tokens_cached": "Those of them found in a prefix cache",
    "generated_tokens": "Tokens that the model chose",
    "generations": "Generations that ended by themselves",
    "generations_cancelled": "Generations cancelled by their client or the end of the server",
    "generations_failed": "Generations ended by an error",
    "requests_refused_queue_full": "Requests refused because the queue was full",
    "queue_seconds": "Seconds that requests waited before their generation began",
    "prompt_seconds": "Seconds from the beginning of a generation to its first token",
    "generation_seconds": "Seconds that generations took",
}
GAUGES = {
    "queue_length": "Requests that wait",
    "generations_running": "Generations under way: 0 or 1",
    "prefix_cache_bytes": "Memory of the kept prefix caches",
    "prefix_cache_limit_bytes": "Most that they may take",
    "prefix_cache_entries": "Kept prefix caches",
}


def _of_experts(total: Any) -> Iterator[tuple[str, str, str, float]]:
    yield "expert_cache_hits_total", "counter", "Experts found in memory", total.hits
    yield "expert_cache_misses_total", "counter", "Experts that had to be read", total.misses
    yield "expert_cache_evictions_total", "counter", "Experts that left their slot", total.evictions
    yield "expert_bytes_read_total", "counter", "Stored bytes of the misses", total.bytes_read
    yield (
        "expert_bytes_wasted_total",
        "counter",
        "Bytes of guesses that were not used",
        total.wasted_bytes,
    )
    yield "expert_cache_hit_ratio", "gauge", "Hits as a share of hits and misses", total.hit_ratio


def _metric(name: str, kind: str, text: str, value: float) -> list[str]:
    return [*_head(name, kind, text), f"{PREFIX}_{name} {value:.12g}"]


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {text}.", f"# TYPE {PREFIX}_{name} {kind}"]
