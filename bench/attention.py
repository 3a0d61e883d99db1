"""Speed of one token's attention over a KV cache, with 8x7B's heads, on the CPU.

alone    attention over caches in turn, so that their bytes come from memory; after each, a
         streaming sum over another cache's bytes. Medians and lowest values
layer    (with FOLDER) single tokens of a converted model after random keys and values, all experts
         in RAM: ms per layer
growth   ms for a layer's cache that is full and moves into twice the memory

--against measures another build of libmoe_kernels in turn, token by token.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import byref
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import loader
from loader.arithmetic import kernels
from loader.arithmetic.kernels import PackedMatrix
from loader.arithmetic.native_library import KvCache, library
from loader.decode import kv_blocks
from loader.decode.native_structures import attention_structure
from loader.decode.weights import AttentionWeights, LayerWeights
from loader.hf.growing_cache import GrowingLayer, growing_layers

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN = 64
"""Columns of the projections of part alone: they take a few microseconds."""
COLD_BYTES = 400 << 20
"""Bytes of all caches that take turns: many times a processor's cache."""
PACKING = "tile32-q4-g64-s8"


def milliseconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


class Builds:
    """The installed library, and perhaps another build of it."""

    def __init__(self, against: Path | None) -> None:
        self.named: dict[str, Any] = {"this": library()}
        if against is not None:
            self.named["against"] = self._loaded(against)

    def _loaded(self, path: Path) -> ctypes.CDLL:
        other = ctypes.CDLL(str(path.resolve()))
        for name in ("moe_attention_step", "moe_token_step", "moe_set_threads", "moe_set_isa"):
            function, model = getattr(other, name), getattr(library(), name)
            function.argtypes, function.restype = model.argtypes, model.restype
        return other

    def set_threads(self, threads: int) -> None:
        """Set the number of threads of each build."""
        kernels.set_threads(threads)
        for build in self.named.values():
            build.moe_set_threads(threads)

    def set_isa(self, name: str) -> None:
        """Let each build use the instruction set."""
        kernels.set_isa(name)
        for build in self.named.values():
            build.moe_set_isa(kernels.ISAS[name])


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """Return medians and lowest values, and the medians of the other build's ratios."""
    row = {}
    for name, values in times.items():
        row[f"{name}_ms"] = statistics.median(values)
        row[f"{name}_min_ms"] = min(values)
    if "against" in times:
        pairs = zip(times["against"], times["this"], strict=True)
        row["against_over_this"] = statistics.median(a / b for a, b in pairs)
    return row


class Alone:
    """The attention of one layer over several caches of `positions` random positions."""

    def __init__(self, positions: int, kv_bits: int) -> None:
        wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        attention = AttentionWeights(
            matrix(wide, HIDDEN),
            matrix(narrow, HIDDEN),
            matrix(narrow, HIDDEN),
            matrix(HIDDEN, wide),
        )
        none = torch.empty(0)
        self._layer = LayerWeights(
            attention, HEAD_DIM, HEAD_DIM**-0.5, none, 0.0, none, 0.0, none, 0, {}
        )
        self._structure = attention_structure(self._layer, HIDDEN, torch.bfloat16)
        self._position = torch.full((HEAD_DIM,), 0.7).bfloat16()
        self._x = torch.randn(HIDDEN).bfloat16()
        self._out = torch.empty_like(self._x)
        self._positions, self._format = positions, int(kv_bits == 8)
        self.caches = [self._cache()]
        self.cache_bytes = sum(part.nbytes for part in self.caches[0])
        for _ in range(max(1, -(-COLD_BYTES // self.cache_bytes) - 1)):
            self.caches.append(self._cache())

    def _cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return random keys and values; the last position is not filled."""
        shape = (1, KV_HEADS, self._positions, HEAD_DIM)
        keys, values = (torch.randn(shape).bfloat16() for _ in range(2))
        if not self._format:
            return keys, values
        blocks = [kv_blocks.empty(*shape) for _ in range(2)]
        for memory, rows, part in zip(blocks, (keys, values), kv_blocks.Part, strict=True):
            kv_blocks.store(memory, 0, rows, part)
        return blocks[0], blocks[1]

    def step(self, build: Any, number: int) -> None:
        """Compute the attention of the last position of cache `number`."""
        keys, values = self.caches[number]
        capacity = kv_blocks.POSITIONS * keys.shape[2] if self._format else self._positions
        cache = KvCache(
            keys.data_ptr(), values.data_ptr(), capacity, self._positions - 1, self._format
        )
        inputs = (self._x.data_ptr(), self._position.data_ptr(), self._position.data_ptr())
        error = build.moe_attention_step(
            byref(self._structure), *inputs, byref(cache), self._out.data_ptr()
        )
        if error:
            raise RuntimeError(f"moe_attention_step: status {error}")

    def times(self, builds: Builds, rounds: int) -> dict[str, float]:
        """Measure the builds and the sum over the same bytes, each on cold caches."""
        times: dict[str, list[float]] = {name: [] for name in (*builds.named, "stream")}
        count, number = len(self.caches), 0
        for _ in range(rounds):
            for name, build in builds.named.items():
                number = (number + 1) % count
                times[name].append(milliseconds(lambda: self.step(build, number)))  # noqa: B023
            number = (number + 1) % count
            buffers = [part.view(torch.uint8) for part in self.caches[number]]
            times["stream"].append(milliseconds(lambda: kernels.stream_sum(buffers)))  # noqa: B023
        return summary(times)


def matrix(rows: int, columns: int) -> PackedMatrix:
    """Return a packed matrix of random codes with row scales of 2^-10."""
    size = kernels.packed_bytes(PACKING, rows, columns)
    tiles = torch.randint(0, 256, (size,), dtype=torch.uint8)
    tiles.view(rows // 32, -1)[:, :128] = torch.full((64,), 2.0**-10).half().view(torch.uint8)
    return PackedMatrix(tiles, PACKING, rows)


class Layers:
    """Single tokens of a converted model."""

    def __init__(self, folder: Path, kv_bits: int) -> None:
        self.model = loader.from_pretrained(folder, ram_cache="1TiB", kv_bits=kv_bits)
        self._kv_bits = kv_bits
        config = self.model.config
        self.count = config.num_hidden_layers
        self._shape = (1, config.num_key_value_heads, HEAD_DIM)

    @torch.inference_mode()
    def times(self, builds: Builds, positions: int, rounds: int) -> dict[str, float]:
        """ms per layer of a token at `positions` and the next ones."""
        one, heads, dim = self._shape
        cache = DynamicCache()
        for layer in growing_layers(cache, self.count, self._kv_bits) or ():
            values = torch.randn(one, heads, positions, dim).bfloat16()
            layer.update(values, values.flip(2))
        self._token(cache)  # makes the decoder
        decoder = self.model._serving._path._made[1]
        times: dict[str, list[float]] = {name: [] for name in builds.named}
        runs = {name: build.moe_token_step for name, build in builds.named.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                decoder._run = run
                times[name].append(milliseconds(lambda: self._token(cache)) / self.count)
        decoder._run = builds.named["this"].moe_token_step
        return summary(times)

    def _token(self, cache: DynamicCache) -> None:
        token = torch.randint(5, self.model.config.vocab_size, (1, 1))
        self.model(token, past_key_values=cache, use_cache=True)


def growth_ms(positions: int) -> float:
    """ms of a full layer's move into memory for twice the positions, keys and values."""
    layer = GrowingLayer()
    half = torch.randn(1, KV_HEADS, positions // 2, HEAD_DIM).bfloat16()
    layer.update(half, half)
    layer.update(half, half)
    kind = (KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cpu"))
    return milliseconds(lambda: layer.place(kind))


def main() -> None:
    """Run the parts and print a table, or one JSON object with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="converted folder for part layer")
    parser.add_argument(
        "--positions", default="32,2048,4096,8192", help="comma list (default: %(default)s)"
    )
    parser.add_argument("--threads", default="", help="comma list (default: 1 and one per core)")
    parser.add_argument("--kv-bits", default="16", help="16, 8 or 16,8 (default: 16)")
    parser.add_argument("--rounds", type=int, default=30, help="measurements (default: 30)")
    parser.add_argument(
        "--isa", default="auto", help="instruction set (default: the best)", choices=kernels.ISAS
    )
    parser.add_argument("--against", type=Path, help="another build of libmoe_kernels.so")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    builds = Builds(options.against)
    kernels.set_threads(0)
    threads = [int(n) for n in options.threads.split(",") if n] or sorted({1, kernels.threads()})
    kv_bits = [int(n) for n in options.kv_bits.split(",")]
    positions = [int(n) for n in options.positions.split(",")]
    builds.set_isa(options.isa)
    result: dict[str, Any] = {"kernels": kernels.describe(), "rows": []}

    def note(part: str, row: dict[str, Any]) -> None:
        result["rows"].append({"part": part} | row)
        text = "  ".join(
            f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
        )
        print(f"{part:7s} {text}", file=sys.stderr if options.json else sys.stdout, flush=True)

    for count in positions:
        for bits in kv_bits:
            alone = Alone(count, bits)
            for n in threads:
                builds.set_threads(n)
                row = alone.times(builds, options.rounds)
                about = {"positions": count, "kv_bits": bits, "threads": n}
                note("alone", about | {"mb": alone.cache_bytes / 1e6} | row)
            del alone
    builds.set_threads(threads[-1])
    if options.folder is not None:
        for bits in kv_bits:
            layers = Layers(options.folder, bits)
            for count in positions:
                row = layers.times(builds, count, options.rounds)
                about = {"positions": count, "kv_bits": bits, "threads": threads[-1]}
                note("layer", about | row)
    note("growth", {"positions": positions[-1], "ms": growth_ms(positions[-1])})
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
