"""Speed of the native CPU kernels for experts, without attention and without Python between layers.

cold     fused calls of two experts over gigabytes of distinct 8x7B experts, in turn with a
         streaming sum over the same buffers: medians of GB/s, and of each pair's ratio
isa      the same calls with AVX2 and with AVX-512, in turn
prompt   GMAC/s at 32, 128 and 512 tokens an expert
tokens   ms of one expert for 1 to 128 tokens: no cliff between the two kernels; --plot draws it
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from random_matrices import ExpertPool, generator_for

from formats.expert import ExpertLayout
from formats.packing import PACKINGS
from loader.arithmetic import kernels
from loader.arithmetic.expert_table import ExpertTable
from loader.arithmetic.native_library import library


class Experts:
    """Copies of a random expert of one packing, in anonymous memory with 2 MiB pages."""

    def __init__(self, packing: str, hidden: int, intermediate: int, total_bytes: int) -> None:
        self.packing, self.hidden, self.intermediate = packing, hidden, intermediate
        self.size = kernels.expert_bytes(packing, packing, hidden, intermediate)
        stride = -(-self.size // 4096) * 4096
        self.count = max(2, total_bytes // stride // 2 * 2)
        self._map = mmap.mmap(-1, self.count * stride)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        layout = ExpertLayout(hidden, intermediate, PACKINGS[packing], PACKINGS[packing])
        one = ExpertPool(layout, generator_for(0, "pool")).draw(generator_for(0, "expert"))
        self.blobs = [whole[i * stride : i * stride + self.size] for i in range(self.count)]
        for blob in self.blobs:
            blob.copy_(one)
        self.table = ExpertTable(self.count, hidden, intermediate, packing, packing)
        for i, blob in enumerate(self.blobs):
            self.table.set(i, blob)
        self.macs = 3 * hidden * intermediate

    def inputs(self, tokens: int) -> torch.Tensor:
        """Activations fp32 [tokens, hidden]."""
        return torch.randn((tokens, self.hidden), generator=torch.Generator().manual_seed(1))

    def layers(self, tokens: int = 1) -> Callable[[], None]:
        """Run all experts once, two in a call, each for all tokens."""
        x = self.inputs(tokens)
        weights = torch.full((tokens, 2), 0.5)
        indices = [torch.tensor([[i, i + 1]]).repeat(tokens, 1) for i in range(0, self.count, 2)]

        def run() -> None:
            for index in indices:
                self.table.run(x, index, weights)

        return run

    def stream(self) -> Callable[[], None]:
        """The streaming sum over the same buffers, two a call."""
        pairs = [self.blobs[i : i + 2] for i in range(0, self.count, 2)]

        def run() -> None:
            for pair in pairs:
                kernels.stream_sum(pair)

        return run


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def in_turn(a: Callable[[], None], b: Callable[[], None], pairs: int) -> list[tuple[float, float]]:
    """Seconds of a and b, measured alternately; the first pair warms up and is dropped."""
    return [(seconds(a), seconds(b)) for _ in range(pairs + 1)][1:]


def cold(experts: Experts, threads: int, pairs: int) -> dict[str, Any]:
    """GB/s of decode and of the sum over the same bytes."""
    kernels.set_threads(threads)
    times = in_turn(experts.layers(), experts.stream(), pairs)
    total = experts.count * experts.size
    decode, stream = (statistics.median(t[i] for t in times) for i in range(2))
    return {
        "packing": experts.packing,
        "threads": threads,
        "ms_per_layer": 1e3 * decode / (experts.count / 2),
        "gb_s": total / decode / 1e9,
        "stream_gb_s": total / stream / 1e9,
        "share": statistics.median(s / d for d, s in times),
        "empty_region_us": library().moe_empty_region_us(1000) if threads > 1 else 0.0,
    }


def isa_ratio(experts: Experts, threads: int, pairs: int) -> dict[str, Any]:
    """Time of AVX2 over time of AVX-512."""
    kernels.set_threads(threads)
    run = experts.layers()

    def on(name: str) -> Callable[[], None]:
        def call() -> None:
            kernels.set_isa(name)
            run()

        return call

    times = in_turn(on("avx2"), on("avx512"), pairs)
    kernels.set_isa("auto")
    ratio = statistics.median(a / b for a, b in times)
    return {"packing": experts.packing, "threads": threads, "avx2_over_avx512": ratio}


def one_expert_ms(experts: Experts, tokens: int, repeats: int) -> float:
    """Median ms of one expert for all tokens, another expert each time."""
    x, weights = experts.inputs(tokens), torch.ones((tokens, 1))
    indices = [torch.full((tokens, 1), i % experts.count) for i in range(repeats + 1)]

    def one(i: int) -> float:
        begin = time.perf_counter()
        experts.table.run(x, indices[i], weights)
        return time.perf_counter() - begin

    return 1e3 * statistics.median([one(i) for i in range(repeats + 1)][1:])


def prompt(experts: Experts, threads: int, tokens: int, repeats: int) -> dict[str, Any]:
    """GMAC/s of one expert serving `tokens` tokens."""
    kernels.set_threads(threads)
    ms = one_expert_ms(experts, tokens, repeats)
    rate = experts.macs * tokens / ms / 1e6
    return {
        "packing": experts.packing,
        "threads": threads,
        "tokens": tokens,
        "ms_per_expert": ms,
        "gmac_s": rate,
    }


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """An SVG of the rows of part "tokens": ms of one expert against tokens, one line a packing.
    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "decode"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        times = row["ms_per_expert"]
        axes.plot(
            [int(tokens) for tokens in times],
            list(times.values()),
            marker=".",
            label=row["packing"],
        )
    threads = rows[0]["threads"]
    axes.set(
        xlabel="tokens", ylabel=f"ms of one expert, {threads} thread{'s' if threads > 1 else ''}"
    )
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def give_back_memory() -> None:
    """Return freed pages before the next packing is built."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Run the chosen parts and print a table, or one JSON object with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", default="cold,isa,prompt,tokens", help="comma list (default: all)"
    )
    parser.add_argument("--packings", default=",".join(PACKINGS), help="comma list (default: all)")
    parser.add_argument("--threads", default="", help="comma list (default: 1 and one per core)")
    parser.add_argument(
        "--gigabytes", type=float, default=2.4, help="experts in memory, per packing (default: 2.4)"
    )
    parser.add_argument("--pairs", type=int, default=9, help="measured pairs (default: 9)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smoke test: small experts, 0.2 GB, few pairs",
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="draw part tokens (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    hidden, intermediate = (1024, 2048) if options.quick else (4096, 14336)
    size = 0.2 if options.quick else options.gigabytes
    pairs = 2 if options.quick else options.pairs
    kernels.set_threads(0)
    threads = [int(t) for t in options.threads.split(",") if t] or sorted(
        {1, kernels.threads()}, reverse=True
    )
    parts = options.parts.split(",")
    if options.plot and "tokens" not in parts:
        parser.error("--plot draws part tokens: add it to --parts")
    result: dict[str, Any] = {"kernels": kernels.describe(), "shape": [hidden, intermediate]}
    result |= {part: [] for part in parts}

    def note(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        text = "  ".join(
            f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
        )
        print(f"{part:7s} {text}", file=sys.stderr if options.json else sys.stdout, flush=True)

    for packing in options.packings.split(","):
        experts = Experts(packing, hidden, intermediate, int(size * 1e9))
        for n in threads:
            if "cold" in parts:
                note("cold", cold(experts, n, pairs))
            if "isa" in parts and {"avx2", "avx512"} <= set(kernels.supported_isas()):
                note("isa", isa_ratio(experts, n, pairs))
            if "prompt" in parts:
                for tokens in (32, 128) if options.quick else (32, 128, 512):
                    note("prompt", prompt(experts, n, tokens, max(2, 400 // tokens)))
        if "tokens" in parts:
            kernels.set_threads(threads[0])
            counts = [
                1,
                2,
                3,
                4,
                5,
                6,
                7,
                8,
                9,
                10,
                12,
                13,
                16,
                20,
                24,
                25,
                32,
                40,
                48,
                49,
                56,
                63,
                64,
                80,
                96,
                97,
                112,
                128,
            ]
            ms = {str(t): round(one_expert_ms(experts, t, 7), 3) for t in counts}
            note("tokens", {"packing": packing, "threads": threads[0], "ms_per_expert": ms})
        del experts
        give_back_memory()
    if options.plot:
        plot(result["tokens"], options.plot)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
