"""What `generate --stats` shows: a live line while tokens come, and a table at the end."""

from typing import Any

from converter.cli.show.console import gigabytes, table


def live_line(answer: Any, model: Any) -> str:
    """Return the state of an answer and of the cache of its model."""
    total = model.moe_stats().total
    rate = f"{answer.tokens_per_s:.2f} tokens/s, " if answer.tokens_per_s else ""
    counted = f"{len(answer.token_ids)} tokens, {rate}"
    return f"{counted}hit ratio {total.hit_ratio:.3f}, read {gigabytes(total.bytes_read)}"


def with_shares(cache: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """`MoeStats.as_dict` and which shares of the time went by waiting for reads, and with a read
    under way.
    """
    return {
        **cache,
        **{
            f"{name}_share": cache[f"{name}_s"] / seconds if seconds else 0.0
            for name in ("wait", "busy")
        },
    }


def stats_table(result: dict[str, Any]) -> str:
    """What `generate --json` prints, as text: the cache by layer, then the run."""
    cache = result["cache"]
    heading = (
        "layer",
        "slots",
        "hits",
        "misses",
        "hit ratio",
        "guesses",
        "useful",
        "recall",
        "evictions",
        "read",
        "wasted",
    )
    rows: list[tuple[str, ...]] = [heading]
    for name, layer in [*enumerate(cache["layers"]), ("all", cache)]:
        rows.append(
            (
                str(name), f"{layer['slots']:g}", str(layer["hits"]), str(layer["misses"]), f"{layer['hit_ratio']:.3f}",
                str(layer["guesses"]), str(layer["useful_guesses"]), f"{layer['recall']:.3f}", str(layer["evictions"]),
                gigabytes(layer["bytes_read"]), gigabytes(layer["wasted_bytes"]),
            )
        )  # fmt: skip
    rate = f"{result['tokens_per_s']:.2f} tokens/s" if result["tokens_per_s"] else "one token"
    return (
        f"{table(rows)}\n"
        f"{result['prompt_tokens']} prompt tokens, first token after {result['first_token_s']:.2f} s;"
        f" {result['new_tokens']} new tokens, {rate}\n"
        f"{cache['wait_share']:.0%} of {result['seconds']:.2f} s waited for reads, the disk was busy"
        f" {cache['busy_share']:.0%}; the slots hold {gigabytes(cache['slot_bytes'])}\n"
        f"{_paths_line(cache['tokens'])}{_tier_line(cache)}"
        "recall: the misses that had been guessed; wasted: read for wrong guesses, beside read"
    )


def _paths_line(tokens: dict[str, Any]) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(tokens["reasons"].items()))
    return f"tokens by the decoder: {tokens['decoder']}; by transformers' code: {tokens['transformers']} ({reasons})\n"


def _tier_line(cache: dict[str, Any]) -> str:
    if not (ram := cache.get("ram")):
        return ""
    return (
        f"slots are on the GPU, read is what was copied there; {cache['cpu_experts']} experts computed on the CPU; RAM"
        f" for {gigabytes(ram['buffer_bytes'])}: {ram['hits']} hits, {ram['misses']} misses,"
        f" {gigabytes(ram['bytes_read'])} from the disk\n"
    )
