"""Metrics of a server as Prometheus text."""

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
        """Add `amount` to the counter `name`, a key of COUNTERS."""
        if name not in COUNTERS:
            raise KeyError(name)
        with self._lock:
            self._values[name] += amount  # type: ignore[assignment]

    def count_response(self, route: str, status: int) -> None:
        """Count one HTTP response."""
        with self._lock:
            self._responses[route, status] += 1

    def value(self, name: str) -> float:
        """Return the value of a counter."""
        with self._lock:
            return self._values[name]

    def text(self, gauges: dict[str, float], experts: Any) -> str:
        """Return the page of /metrics.

        gauges: values of GAUGES. experts: totals of the expert cache (`LayerStats`).
        """
        with self._lock:
            values, responses = dict(self._values), dict(self._responses)
        lines: list[str] = []
        for name, text in COUNTERS.items():
            lines += _metric(f"{name}_total", "counter", text, values.get(name, 0))
        lines += _head("http_responses_total", "counter", "HTTP responses by route and status")
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
    "prompt_tokens": "Prompt tokens of started generations",
    "prompt_tokens_cached": "Prompt tokens found in a prefix cache",
    "generated_tokens": "Tokens generated",
    "generations": "Generations that completed",
    "generations_cancelled": "Generations cancelled by their client or by shutdown",
    "generations_failed": "Generations that failed with an error",
    "requests_refused_queue_full": "Requests refused because the queue was full",
    "queue_seconds": "Seconds that requests waited in the queue",
    "prompt_seconds": "Seconds from the start of a generation to its first token",
    "generation_seconds": "Seconds spent in generations",
}
GAUGES = {
    "queue_length": "Requests waiting in the queue",
    "generations_running": "Running generations: 0 or 1",
    "prefix_cache_bytes": "Bytes of kept prefix caches",
    "prefix_cache_limit_bytes": "Limit of prefix_cache_bytes",
    "prefix_cache_entries": "Number of kept prefix caches",
}


def _of_experts(total: Any) -> Iterator[tuple[str, str, str, float]]:
    yield "expert_cache_hits_total", "counter", "Expert cache hits", total.hits
    yield "expert_cache_misses_total", "counter", "Expert cache misses", total.misses
    yield "expert_cache_evictions_total", "counter", "Expert cache evictions", total.evictions
    yield "expert_bytes_read_total", "counter", "Stored bytes read for misses", total.bytes_read
    yield (
        "expert_bytes_wasted_total",
        "counter",
        "Stored bytes read for wrong prefetches",
        total.wasted_bytes,
    )
    yield "expert_cache_hit_ratio", "gauge", "Hits as a share of hits and misses", total.hit_ratio


def _metric(name: str, kind: str, text: str, value: float) -> list[str]:
    return [*_head(name, kind, text), f"{PREFIX}_{name} {value:.12g}"]


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {text}.", f"# TYPE {PREFIX}_{name} {kind}"]
