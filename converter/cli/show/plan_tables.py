"""Memory plans as text."""

from collections.abc import Iterator, Sequence
from typing import Any

from converter.cli.show.console import GB
from converter.cli.show.tables import table
from formats.sizes import format_size


def text_of(result: dict[str, Any], *, detailed: bool) -> str:
    """Return the result of `plan --json` as text.

    detailed: all parts of a single budget; otherwise a row per budget.
    """
    experts = (
        f"{result['layers']} layers of {result['experts']} experts,"
        f" {format_size(result['expert_bytes'])}"
    )
    routing = (
        f"hit ratios of {result['trace']}" if result["trace"] else "every expert equally likely"
    )
    heading = (
        f"{result['path']} ({result['recipe']}): {experts}\n"
        f"{_speeds(result)}; {routing}; {result['context']} positions,"
        f" prompts of {result['prompt']} tokens"
    )
    plans = result["plans"]
    if "gpu" in plans[0]:
        body = "\n".join(_gpu_parts(plans[0], result))
    else:
        body = "\n".join(_parts(plans[0], result)) if detailed else _comparison(plans, result)
    return f"{heading}\n\n{body}"


def _speeds(result: dict[str, Any]) -> str:
    names = {"disk": ".2f", "memory": ".1f", "link": ".1f", "gpu_memory": ".1f"}
    speeds = ((name, digits, result.get(f"{name}_bytes_per_s")) for name, digits in names.items())
    return ", ".join(
        f"{name.replace('gpu_', 'GPU ')} {speed / GB:{digits}} GB/s"
        for name, digits, speed in speeds
        if speed
    )


def _parts(plan: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    rows = [
        ("trunk", plan["trunk_bytes"]),
        ("KV cache" if result["kv_bits"] == 16 else "KV cache, 8 bits", plan["kv_bytes"]),
        *([("prefix caches", plan["prefix_bytes"])] if plan["prefix_bytes"] else []),
        ("process and activations", plan["workspace_bytes"]),
        *_cache_rows(plan, result),
        ("budget", plan["ram_bytes"]),
    ]
    yield _sizes(rows)
    yield ""
    low, high = plan["tokens_per_s"]
    yield (
        f"expected: {plan['read_bytes_per_token'] / 1e6:.1f} MB read per token"
        f" (misses {plan['miss_ratio']:.3f}), {low:.2f} to {high:.2f} tokens/s"
    )
    if measured := plan.get("verified"):
        yield (
            f"measured: {measured['read_bytes_per_token'] / 1e6:.1f} MB read per token"
            f" (misses {1 - measured['hit_ratio']:.3f}), {measured['tokens_per_s']:.2f} tokens/s"
            f" over {measured['tokens']} tokens"
        )
    yield f"run it with --ram-cache {plan['cache_bytes']}"


def _gpu_parts(plan: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    gpu = plan["gpu"]
    rows = [
        ("on the GPU", None),
        ("  trunk", gpu["trunk_bytes"]),
        ("  KV cache", gpu["kv_bytes"]),
        *([("  prefix caches", gpu["prefix_bytes"])] if gpu["prefix_bytes"] else []),
        ("  CUDA context and activations", gpu["workspace_bytes"]),
        *((f"  {name}", n_bytes) for name, n_bytes in _cache_rows(gpu, result)),
        ("  budget", gpu["vram_bytes"]),
        ("in RAM", None),
        ("  process", plan["workspace_bytes"]),
        *((f"  {name}", n_bytes) for name, n_bytes in _cache_rows(plan, result)[1:]),
        ("  budget", plan["ram_bytes"]),
    ]
    yield _sizes(rows)
    yield ""
    low, high = plan["tokens_per_s"]
    yield (
        f"expected: {gpu['copied_bytes_per_token'] / 1e6:.1f} MB copied per token"
        f" (misses {gpu['miss_ratio']:.3f}),"
        f" {plan['read_bytes_per_token'] / 1e6:.1f} MB read (misses {plan['miss_ratio']:.3f}),"
        f" {low:.2f} to {high:.2f} tokens/s"
    )
    if measured := plan.get("verified"):
        yield (
            f"measured: misses {1 - measured['hit_ratio']:.3f} on the GPU,"
            f" {measured['tokens_per_s']:.2f} tokens/s over {measured['tokens']} tokens"
        )
    else:
        yield "computed, with an efficiency that was measured on no GPU"
    if plan["cache_bytes"] == result["expert_bytes"]:
        yield (
            f"with all experts in RAM, which takes {format_size(plan['ram_bytes'])};"
            " --ram SIZE plans with less"
        )
    yield f"run it with --gpu-cache {gpu['cache_bytes']} --ram-cache {plan['cache_bytes']}"


def _cache_rows(part: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, int]]:
    """Return how the expert budget in RAM or on the GPU is used: (name, bytes)."""
    return [
        ("experts in transit", part["aside_bytes"]),
        (f"experts: {_slots(part)} of {result['experts']} in each layer", part["slot_bytes"]),
        ("left over", part["cache_bytes"] - part["aside_bytes"] - part["slot_bytes"]),
    ]


def _sizes(rows: Sequence[tuple[str, int | None]]) -> str:
    return table(
        [(name, "" if n_bytes is None else format_size(n_bytes)) for name, n_bytes in rows]
    )


def _comparison(plans: list[dict[str, Any]], result: dict[str, Any]) -> str:
    verified = "verified" in plans[0]
    heading = [
        "budget",
        "--ram-cache",
        f"slots of {result['experts']}",
        "misses",
        "MB/token",
        "tokens/s",
    ]
    rows = [tuple(heading + (["measured misses", "tokens/s"] if verified else []))]
    for plan in plans:
        low, high = plan["tokens_per_s"]
        row = [
            format_size(plan["ram_bytes"]),
            str(plan["cache_bytes"]),
            _slots(plan),
            f"{plan['miss_ratio']:.3f}",
            f"{plan['read_bytes_per_token'] / 1e6:.1f}",
            f"{low:.2f} to {high:.2f}",
        ]
        if verified:
            row += [
                f"{1 - plan['verified']['hit_ratio']:.3f}",
                f"{plan['verified']['tokens_per_s']:.2f}",
            ]
        rows.append(tuple(row))
    return table(rows)


def _slots(plan: dict[str, Any]) -> str:
    fewest = min(plan["slots"])
    largest = max(plan["slots"])
    return str(fewest) if fewest == largest else f"{fewest} or {largest}"
