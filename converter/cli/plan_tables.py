"""Plans as text."""

from collections.abc import Iterator
from typing import Any

from converter.cli.output import gigabytes, table

GB = 10**9


def text_of(result: dict[str, Any], *, detailed: bool) -> str:
    """What `plan --json` prints as text: each part of the one budget if `detailed`, else a line for each budget."""
    experts = f"{result['layers']} layers of {result['experts']} experts, {gigabytes(result['expert_bytes'])}"
    routing = f"hit ratios of {result['trace']}" if result["trace"] else "every expert equally likely"
    heading = (
        f"{result['path']} ({result['recipe']}): {experts}\n"
        f"disk {result['disk_bytes_per_s'] / GB:.2f} GB/s, memory {result['memory_bytes_per_s'] / GB:.1f} GB/s;"
        f" {routing}; {result['context']} positions, prompts of {result['prompt']} tokens"
    )
    plans = result["plans"]
    body = "\n".join(_parts(plans[0], result)) if detailed else _comparison(plans, result)
    return f"{heading}\n\n{body}"


def _parts(plan: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    left = plan["cache_bytes"] - plan["aside_bytes"] - plan["slot_bytes"]
    rows = [
        ("trunk", plan["trunk_bytes"]),
        ("KV cache", plan["kv_bytes"]),
        ("process and activations", plan["workspace_bytes"]),
        ("experts on their way", plan["aside_bytes"]),
        (f"experts: {_slots(plan)} of {result['experts']} in each layer", plan["slot_bytes"]),
        ("left over", left),
        ("budget", plan["ram_bytes"]),
    ]
    yield table([(name, gigabytes(n_bytes)) for name, n_bytes in rows])
    yield ""
    low, high = plan["tokens_per_s"]
    yield (
        f"expected: {plan['read_bytes_per_token'] / 1e6:.1f} MB read a token"
        f" (misses {plan['miss_ratio']:.3f}), {low:.2f} to {high:.2f} tokens/s"
    )
    if found := plan.get("verified"):
        yield (
            f"measured: {found['read_bytes_per_token'] / 1e6:.1f} MB read a token"
            f" (misses {1 - found['hit_ratio']:.3f}), {found['tokens_per_s']:.2f} tokens/s"
            f" over {found['tokens']} tokens"
        )
    yield f"run it with --ram-cache {plan['cache_bytes']}"


def _comparison(plans: list[dict[str, Any]], result: dict[str, Any]) -> str:
    verified = "verified" in plans[0]
    heading = ["budget", "--ram-cache", f"slots of {result['experts']}", "misses", "MB/token", "tokens/s"]
    rows = [tuple(heading + (["measured misses", "tokens/s"] if verified else []))]
    for plan in plans:
        low, high = plan["tokens_per_s"]
        row = [
            gigabytes(plan["ram_bytes"]), str(plan["cache_bytes"]), _slots(plan),
            f"{plan['miss_ratio']:.3f}", f"{plan['read_bytes_per_token'] / 1e6:.1f}", f"{low:.2f} to {high:.2f}",
        ]  # fmt: skip
        if verified:
            row += [f"{1 - plan['verified']['hit_ratio']:.3f}", f"{plan['verified']['tokens_per_s']:.2f}"]
        rows.append(tuple(row))
    return table(rows)


def _slots(plan: dict[str, Any]) -> str:
    least, most = min(plan["slots"]), max(plan["slots"])
    return str(least) if least == most else f"{least} or {most}"
