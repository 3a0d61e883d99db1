"""Find times in which a GPU is idle, from a profiler trace, in total and per layer."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "kernel"}
"""Categories of torch's traces, and what they are here."""


class Interval(NamedTuple):
    """A kernel, or a copy of any direction. Times in µs."""

    begin: float
    end: float
    kind: str
    name: str


def intervals_of(trace: dict[str, Any]) -> list[Interval]:
    """Return kernels and copies sorted by begin, from a trace of torch.profiler."""
    found = [
        Interval(event["ts"], event["ts"] + event["dur"], _KINDS[event["cat"]], event["name"])
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _KINDS
    ]
    return sorted(found)


def busy_us(intervals: Iterable[Interval], begin: float, end: float) -> float:
    """Return the µs between begin and end in which at least one interval runs.

    intervals: sorted by begin.
    """
    busy, at = 0.0, begin
    for interval in intervals:
        busy += max(0.0, min(interval.end, end) - max(interval.begin, at))
        at = max(at, interval.end)
    return busy


def layer_begins(intervals: Sequence[Interval]) -> list[float]:
    """Return the begin of each layer of each token, in µs.

    A layer begins with the norm before its attention (loader/cuda/decode/gpu_layer.py).
    """
    begins, norm = [], None
    for interval in intervals:
        if interval.name.startswith("add_norm_"):
            norm = interval.begin
        elif (
            interval.name.startswith("attend_")
            and interval.name != "attend_combine"
            and norm is not None
        ):
            begins.append(norm)
            norm = None
    return begins


def gaps(intervals: Sequence[Interval], layers: int) -> list[dict[str, Any]]:
    """Return a row for each layer and one for a whole token, medians over tokens.

    A row has the µs, the idle µs (neither kernel nor copy), and the shares with nothing, a kernel,
    or a copy to the GPU. The last layer's row includes the head, the choice of the token, and
    Python until the next token. Empty if the trace has no whole tokens of the fused path.
    """
    begins = layer_begins(intervals)
    tokens, rest = divmod(len(begins), layers)
    if rest or tokens < 2:
        return []
    kernels = [i for i in intervals if i.kind == "kernel"]
    to_gpu = [i for i in intervals if i.kind == "copy" and "HtoD" in i.name]

    def row(name: str, first: int, step: int) -> dict[str, Any]:
        spans = [
            (begins[t * layers + first], begins[t * layers + first + step])
            for t in range(tokens - 1)
        ]
        parts = [
            (end - begin, *(busy_us(of, begin, end) for of in (intervals, kernels, to_gpu)))
            for begin, end in spans
        ]
        us = statistics.median(length for length, *_ in parts)
        idle = statistics.median(length - busy for length, busy, *_ in parts)
        shares = [statistics.median(part[i] / part[0] for part in parts) for i in (1, 2, 3)]
        return {
            "layer": name,
            "us": us,
            "idle_us": idle,
            "idle_share": 1 - shares[0],
            "kernel_share": shares[1],
            "copy_share": shares[2],
        }

    return [*(row(str(layer), layer, 1) for layer in range(layers)), row("token", 0, layers)]
