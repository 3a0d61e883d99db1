"""What `generate --stats` shows: a live line while tokens come, and a table at the end."""

import shutil
import sys
import time
from typing import Any

from converter.cli.output import gigabytes, table


class Clock:
    """A streamer that notes when tokens come and passes them on to `streamer`, if there is one.

    live: keep a line about the cache of `model` under the text, where stderr is a terminal.
    """

    def __init__(self, streamer: Any, model: Any, *, live: bool) -> None:
        self._streamer, self._model = streamer, model
        self._line = _LiveLine() if live and sys.stderr.isatty() else None
        self._at_s: list[float] = []
        self._started_s = time.perf_counter()

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token."""
        self._at_s.append(time.perf_counter())
        if self._line:
            self._line.clear()
        if self._streamer:
            self._streamer.put(value)
        if self._line and len(self._at_s) > 1:
            self._line.draw(self._state())

    def end(self) -> None:
        """Called last."""
        if self._line:
            self._line.clear()
        if self._streamer:
            self._streamer.end()

    @property
    def tokens(self) -> int:
        """New tokens until now; the first call brought the prompt."""
        return max(0, len(self._at_s) - 1)

    def times(self, new_tokens: int) -> dict[str, float | None]:
        """Seconds since the beginning and to the first new token, and tokens a second after it (None where there was
        one only)."""
        # The first call brings the prompt.
        first_s, last_s = self._at_s[1], self._at_s[-1]
        rate = (new_tokens - 1) / (last_s - first_s) if new_tokens > 1 else None
        return {
            "seconds": time.perf_counter() - self._started_s,
            "first_token_s": first_s - self._started_s,
            "tokens_per_s": rate,
        }

    def _state(self) -> str:
        tokens, total = len(self._at_s) - 1, self._model.moe_stats().total
        rate = f"{(tokens - 1) / (self._at_s[-1] - self._at_s[1]):.2f} tokens/s, " if tokens > 1 else ""
        return f"{tokens} tokens, {rate}hit ratio {total.hit_ratio:.3f}, read {gigabytes(total.bytes_read)}"


class _LiveLine:
    """The line below the cursor of the terminal at stderr; the cursor stays where the text goes on."""

    def draw(self, text: str) -> None:
        # Down and up first: at the bottom that scrolls, before the position is saved.
        self._write(f"\x1bD\x1b[A\x1b7\x1b[B\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}\x1b8")

    def clear(self) -> None:
        self._write("\x1b7\x1b[B\r\x1b[K\x1b8")

    def _write(self, codes: str) -> None:
        sys.stderr.write(codes)
        sys.stderr.flush()


def with_shares(cache: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """`MoeStats.as_dict` and which shares of the time went by waiting for reads, and with a read under way."""
    return {**cache, **{f"{name}_share": cache[f"{name}_s"] / seconds if seconds else 0.0 for name in ("wait", "busy")}}


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
