"""Measure the cost of checksums: decoding with check="fast" and check="none", and the sha256 of the
trunk at loading.

Both models are in one process and decode the same tokens, with `share` of the experts in RAM, so
they have the same misses. They decode in turn (A B B A ...); each pair of passes gives a ratio of
times. A last pass counts the hashed bytes per token and the reading threads' seconds for them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from end_to_end import Clock

import formats.reading.reader
import loader
from formats.artifact import Artifact
from formats.reading.whole_files import file_sha256
from loader.arithmetic.machine import disk_bytes_per_s

CHECKS = ("none", "fast")


def main() -> None:
    """Measure, and print a table, or one JSON object with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a converted folder")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8, help="pairs of passes")
    parser.add_argument("--prefetch", type=int, help="experts to prefetch [default: the loader's]")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result) if options.json else table(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all measurements as one object."""
    artifact = Artifact.open(options.folder)
    expert_bytes = sum(entry.length for layer in artifact.index.layers for entry in layer.experts)
    more = {} if options.prefetch is None else {"prefetch": options.prefetch}
    budget = int(options.share * expert_bytes)
    models = {
        check: loader.from_pretrained(
            options.folder, io="direct", ram_cache=budget, check=check, **more
        )
        for check in CHECKS
    }
    for model in models.values():
        decode(model, options.prompt, options.tokens)
    passes: dict[str, list[dict[str, float]]] = {check: [] for check in CHECKS}
    for number in range(options.rounds):
        for check in CHECKS if number % 2 else reversed(CHECKS):
            passes[check].append(decode(models[check], options.prompt, options.tokens))
    trunk, begin_s = artifact.index.trunk, time.perf_counter()
    file_sha256(artifact.folder, trunk.file)
    trunk_s = time.perf_counter() - begin_s
    files = [artifact.layer_path(layer) for layer in range(len(artifact.index.layers))]
    return {
        "folder": options.folder.name,
        "experts_bytes": expert_bytes,
        "share": options.share,
        "tokens": options.tokens,
        "passes": passes,
        "ratios": [a["s"] / b["s"] for a, b in zip(passes["fast"], passes["none"], strict=True)],
        "hashed": counted(models["fast"], options.prompt, options.tokens),
        "disk_gb_s": disk_bytes_per_s(files, artifact.entry(0, 0).length, seconds=2.0) / 1e9,
        "trunk_bytes": trunk.size_bytes,
        "trunk_sha256_s": trunk_s,
    }


def decode(model: Any, prompt: int, tokens: int) -> dict[str, float]:
    """Return seconds, missed and wasted bytes, and seconds of waiting, each per token.

    The prompt before the tokens is not counted.
    """
    ids = torch.randint(
        5, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
    )
    begin_s = 0.0

    def begin() -> None:
        nonlocal begin_s
        model.reset_moe_stats()
        begin_s = time.perf_counter()

    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens + 1,
            max_new_tokens=tokens + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=Clock(begin),
        )
    seconds, stats = time.perf_counter() - begin_s, model.moe_stats()
    total = stats.total
    return {
        "s": seconds / tokens,
        "wait_s": stats.wait_s / tokens,
        "missed_bytes": total.bytes_read / tokens,
        "wasted_bytes": total.wasted_bytes / tokens,
        "hit_ratio": total.hit_ratio,
    }


def counted(model: Any, prompt: int, tokens: int) -> dict[str, float]:
    """Return hashed bytes and CPU seconds of hashing per token, prompt included.

    This is a separate pass, because it times each call.
    """
    found = {"bytes": 0.0, "s": 0.0}
    real = formats.reading.reader.xxh3_of

    def watched(data: Any) -> str:
        begin_s = time.thread_time()
        checksum = real(data)
        found["s"] += time.thread_time() - begin_s
        found["bytes"] += data.nbytes
        return checksum

    formats.reading.reader.xxh3_of = watched
    try:
        decode(model, prompt, tokens)
    finally:
        formats.reading.reader.xxh3_of = real
    return {name: value / tokens for name, value in found.items()}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [
        f"{result['folder']}: experts {result['experts_bytes'] / 1e9:.2f} GB, "
        f"{result['share']:g} of them in RAM,"
        f" disk {result['disk_gb_s']:.2f} GB/s"
    ]
    for check, passes in result["passes"].items():
        m = {key: median(one[key] for one in passes) for key in passes[0]}
        low, high = min(one["s"] for one in passes), max(one["s"] for one in passes)
        lines.append(
            f"{check:5} {1e3 * m['s']:7.1f} ms a token ({1e3 * low:.1f} to {1e3 * high:.1f}), waits"
            f" {1e3 * m['wait_s']:.1f}, misses {m['missed_bytes'] / 1e6:.0f} MB, hits "
            f"{m['hit_ratio']:.3f}"
        )
    ratios, hashed = sorted(result["ratios"]), result["hashed"]
    quick = [
        quantiles([one["s"] for one in result["passes"][check]], n=4)[0]
        for check in ("fast", "none")
    ]
    middle = quantiles(ratios, n=4)
    lines.append(
        f"fast / none: pairs {median(ratios):.3f} (quartiles {middle[0]:.3f}, "
        f"{middle[2]:.3f}), first quartiles"
        f" {quick[0] / quick[1]:.3f}"
    )
    rate = hashed["bytes"] / max(hashed["s"], 1e-9)
    missed = median(one["missed_bytes"] for one in result["passes"]["fast"])
    lines.append(
        f"hashing: {rate / 1e9:.1f} GB/s of processor time; the missed bytes of a token take"
        f" {1e3 * missed / rate:.2f} ms, {100 * missed / rate / quick[1]:.1f} % of the time "
        f"with check none"
    )
    rate = result["trunk_bytes"] / result["trunk_sha256_s"] / 1e9
    lines.append(
        f"trunk: {result['trunk_bytes'] / 1e9:.2f} GB, sha256 {result['trunk_sha256_s']:.2f} "
        f"s, {rate:.2f} GB/s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
