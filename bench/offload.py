"""Measure decoding with less memory than the experts need: the engine, the engine without prefetch,
and plain mmap.

    python bench/make_folder.py /tmp/8x7b
    python bench/offload.py /tmp/8x7b --limits 12GiB 8GiB 6GiB --in-ram --json > offload.json

Each run is its own process in a memory control group (page cache included). With --shares, the
limit is a share of the experts' bytes plus the memory for the rest of the process; with --limits it
is the size itself. --in-ram adds a run without a limit, with all experts in RAM. The folder's page
cache is dropped before each limited run. All modes decode the same tokens after the same random
prompt. Reported:

- tokens per second
- bytes read from the disk, and cache misses, per token
- those bytes over the bytes of the cache's misses (1 without prefetch; wrong guesses add to it)
- the share of time with a read in flight
- the read rate in that time over the disk's limit
- the bound over the token's time: the longer of reading its bytes from the disk and streaming its
  weights from memory

Rates of disk and memory are measured just before each run: direct reads of whole experts for two
seconds, and a streaming sum. With all experts in RAM the sum runs over the experts themselves,
between the decoding runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from end_to_end import Bench, Clock, token_bytes
from memory_groups import memory_group
from offload_table import IN_RAM, MAPPED, processor, setting, table

import loader
from formats.artifact import Artifact
from formats.errors import MoeConvertError
from formats.model_memory import PROCESS_BYTES
from formats.sizes import parse_size
from loader.arithmetic.machine import disk_bytes_per_s, memory_bytes_per_s

MODES: dict[str, dict[str, Any]] = {
    "engine": {"io": "direct"},
    "no prefetch": {"io": "direct", "prefetch": 0},
    MAPPED: {"io": "mmap", "prefetch": 0, "ram_cache": "1TiB"},
}


@dataclass(frozen=True)
class Limit:
    """A memory limit. limit_bytes: of the whole process. budget_bytes: the experts' part."""

    label: str
    limit_bytes: int
    budget_bytes: int


def main() -> None:
    """Run all combinations and print a table; with --json on stderr, and JSON on stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a converted folder")
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--shares", type=float, nargs="*", default=[0.75, 0.5, 0.25])
    limits.add_argument("--limits", nargs="+", metavar="SIZE", help="such as 12GiB 8GiB 6GiB")
    parser.add_argument("--in-ram", action="store_true", help="also with all experts in RAM")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument(
        "--warm", type=int, default=0, help="tokens between the prompt and the measured ones"
    )
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of all modes, in turn")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--json", action="store_true", help="JSON on stdout, the table on stderr")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.folder, **json.loads(options.child))))
        return
    try:
        result = measure(options)
    except MoeConvertError as e:
        sys.exit(f"error: {e.message}")
    print(table(result), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(result, indent=1))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all runs. Return label of the limit -> mode -> list of results of `child`."""
    artifact = Artifact.open(options.folder)
    expert_bytes = sum(e.length for layer in artifact.index.layers for e in layer.experts)
    rest = artifact.index.trunk.size_bytes + PROCESS_BYTES
    limits = list(limits_of(options, expert_bytes, rest))
    runs: dict[str, dict[str, list[Any]]] = {}
    limited = True
    common = {"tokens": options.tokens, "prompt": options.prompt, "warm": options.warm}
    if options.in_ram:
        runs[IN_RAM] = {"engine": []}
        for _ in range(options.rounds):
            found = run(options.folder, {"options": None, **common}, None)
            runs[IN_RAM]["engine"].append(rates(artifact) | found)
            note(IN_RAM, "engine", found)
    for limit in limits:
        runs[limit.label] = {mode: [] for mode in options.modes}
        for _ in range(options.rounds):
            for mode in options.modes:
                drop_page_cache(options.folder)
                measured = rates(artifact)
                with memory_group(limit.limit_bytes) as enter:
                    limited = limited and enter is not None
                    chosen = {"ram_cache": limit.budget_bytes, **MODES[mode]}
                    found = run(options.folder, {"options": chosen, **common}, enter)
                runs[limit.label][mode].append(measured | found)
                note(limit.label, mode, found)
    every = [one for modes in runs.values() for found in modes.values() for one in found]
    disk_gb_s, stream_gb_s = (
        statistics.median(one[name] for one in every) for name in ("disk_gb_s", "stream_gb_s")
    )
    return {
        "bench": "offload",
        "folder": options.folder.name,
        "setting": [
            *setting(artifact.index, options.tokens, options.prompt, options.warm, options.rounds),
            f"{processor()}, disk {disk_gb_s:.1f} GB/s, memory {stream_gb_s:.0f} GB/s.",
        ],
        "expert_bytes": expert_bytes,
        "rest_bytes": rest,
        "token_bytes": token_bytes(artifact),
        "limited": limited,
        "disk_gb_s": disk_gb_s,
        "stream_gb_s": stream_gb_s,
        "runs": runs,
    }


def limits_of(options: argparse.Namespace, expert_bytes: int, rest_bytes: int) -> Iterator[Limit]:
    """Yield the limits to measure. rest_bytes: memory of a process beside its experts.

    Raises MoeConvertError for a size that leaves no memory for experts.
    """
    for text in options.limits or ():
        limit_bytes = parse_size(text, "--limits")
        if limit_bytes <= rest_bytes:
            raise MoeConvertError(f"--limits {text}: trunk and process need {rest_bytes} bytes")
        label = f"{limit_bytes / 2**30:g} GiB"
        yield Limit(label, limit_bytes, limit_bytes - rest_bytes)
    for share in () if options.limits else options.shares:
        budget = int(share * expert_bytes)
        yield Limit(f"{share:g}", budget + rest_bytes, budget)


def rates(artifact: Artifact) -> dict[str, float]:
    """Measure the rates of disk and memory, GB/s."""
    files = [artifact.layer_path(layer) for layer in range(len(artifact.index.layers))]
    disk = disk_bytes_per_s(files, artifact.entry(0, 0).length, seconds=2.0)
    return {"disk_gb_s": disk / 1e9, "stream_gb_s": memory_bytes_per_s(seconds=1.0) / 1e9}


def child(
    folder: Path, options: dict[str, Any] | None, tokens: int, prompt: int, warm: int
) -> dict[str, Any]:
    """Measure one run in this process: the prompt, `warm` tokens, then the measured tokens.

    options: of loader.from_pretrained; None for all experts in RAM.
    """
    if options is None:
        return in_ram(folder, tokens, prompt)
    model = loader.from_pretrained(folder, **options)
    ids = torch.randint(
        5, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
    )
    begin: dict[str, Any] = {}

    def begin_to_measure() -> None:
        model.reset_moe_stats()
        begin.update(s=time.perf_counter(), bytes=disk_bytes())

    torch.manual_seed(0)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=warm + tokens + 1,
            max_new_tokens=warm + tokens + 1,
            # A model of random weights soon repeats its greedy tokens, and so its experts.
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            streamer=Clock(begin_to_measure, warm),
        )
    seconds, read = time.perf_counter() - begin["s"], disk_bytes() - begin["bytes"]
    total = model.moe_stats()
    counted = total.total
    return {
        "tokens_per_s": tokens / seconds,
        "bytes_per_token": read / tokens,
        "missed_bytes_per_token": counted.bytes_read / tokens,
        "wasted_bytes_per_token": counted.wasted_bytes / tokens,
        "misses_per_token": counted.misses / tokens,
        "hit_ratio": counted.hit_ratio,
        "recall": counted.recall,
        "busy_share": total.busy_s / seconds,
        "wait_share": total.wait_s / seconds,
        "busy_gb_s": (counted.bytes_read + counted.wasted_bytes) / max(total.busy_s, 1e-9) / 1e9,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def in_ram(folder: Path, tokens: int, prompt: int) -> dict[str, Any]:
    """Measure decoding with all experts in RAM, between streaming sums over the experts."""
    found = Bench(folder, tokens, prompt).decode(repeats=3)
    return {
        "tokens_per_s": 1e3 / found["ms_per_token"],
        "bytes_per_token": 0.0,
        "stream_gb_s": found["stream_gb_s"],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def run(folder: Path, task: dict[str, Any], enter: Any) -> dict[str, Any]:
    """Run `child` in a process that calls `enter` first."""
    command = [sys.executable, __file__, os.fspath(folder), "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter, check=False)
    if done.returncode:
        raise SystemExit(f"{task}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def note(label: str, mode: str, found: dict[str, Any]) -> None:
    """Print a run's speed on stderr: the whole takes long."""
    print(
        f"{label:>8} {mode:13} {found['tokens_per_s']:7.2f} tokens/s", file=sys.stderr, flush=True
    )


def drop_page_cache(folder: Path) -> None:
    """Drop the folder's files from the page cache; this needs no privileges."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_bytes() -> int:
    """Return the bytes that this process has read from disks, page faults of mmap included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def peak_rss_bytes() -> int:
    """Return the peak resident set of this process, mapped files included, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
