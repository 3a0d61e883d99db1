"""Statistics of `generate --stats`: a live line during generation, a table at the end."""

from typing import Any

from converter.cli.show.tables import table
from formats.sizes import format_size


def live_line(answer: Any, model: Any) -> str:
    """Return speed and cache statistics of a running answer as one line."""
    total = model.moe_stats().total
    rate = f"{answer.tokens_per_s:.2f} tokens/s, " if answer.tokens_per_s else ""
    counted = f"{answer.new_tokens} tokens, {rate}"
    return f"{counted}hit ratio {total.hit_ratio:.3f}, read {format_size(total.bytes_read)}"


def with_shares(cache: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """Return the cache statistics plus `wait_share` and `busy_share`.

    cache: `MoeStats.as_dict`. wait_share: share of `seconds` that waited for reads. busy_share:
    share with a read in progress.
    """
    return {
        **cache,
        **{
            f"{name}_share": cache[f"{name}_s"] / seconds if seconds else 0.0
            for name in ("wait", "busy")
        },
    }


def stats_table(result: dict[str, Any]) -> str:
    """Return the result of `generate --json` as text: a row per layer, then the run."""
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
                str(name),
                f"{layer['slots']:g}",
                str(layer["hits"]),
                str(layer["misses"]),
                f"{layer['hit_ratio']:.3f}",
                str(layer["guesses"]),
                str(layer["useful_guesses"]),
                f"{layer['recall']:.3f}",
                str(layer["evictions"]),
                format_size(layer["bytes_read"]),
                format_size(layer["wasted_bytes"]),
            )
        )
    rate = f"{result['tokens_per_s']:.2f} tokens/s" if result["tokens_per_s"] else "one token"
    return (
        f"{table(rows)}\n"
        f"{result['prompt_tokens']} prompt tokens,"
        f" first token after {result['first_token_s']:.2f} s;"
        f" {result['new_tokens']} new tokens, {rate}\n"
        f"{cache['wait_share']:.0%} of {result['seconds']:.2f} s waited for reads,"
        f" the disk was busy {cache['busy_share']:.0%};"
        f" the slots hold {format_size(cache['slot_bytes'])}\n"
        f"{_paths_line(cache['tokens'])}{_kv_line(cache)}{_tier_line(cache)}"
        "recall: share of the misses that were guessed; wasted: bytes read for wrong guesses,"
        " not counted in read"
    )


def _paths_line(tokens: dict[str, Any]) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(tokens["reasons"].items()))
    return (
        f"tokens by the decoder: {tokens['decoder']};"
        f" by transformers' code: {tokens['transformers']} ({reasons})\n"
    )


def _kv_line(cache: dict[str, Any]) -> str:
    return f"KV cache: {cache['kv_bits']} bits\n" if cache["kv_bits"] != 16 else ""


def _tier_line(cache: dict[str, Any]) -> str:
    if not (ram := cache.get("ram")):
        return ""
    return (
        "slots are on the GPU, read counts copies to the GPU;"
        f" {cache['cpu_experts']} experts computed on the CPU;"
        f" RAM cache of {format_size(ram['buffer_bytes'])}: {ram['hits']} hits,"
        f" {ram['misses']} misses, {format_size(ram['bytes_read'])} from the disk\n"
    )
