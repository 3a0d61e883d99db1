"""Measure decoding with less memory than the experts need: the engine, the engine without prefetch,
and plain mmap.

Each run is its own process in a memory control group (page cache included). The limit is `share` of
the experts' bytes plus the memory for the rest of the process. The folder's page cache is dropped
before. All modes decode the same tokens after the same random prompt. Reported:

- tokens per second
- bytes read from the disk per token
- those bytes over the bytes of the cache's misses (1 without prefetch; wrong guesses add to it)
- the share of time with a read in flight
- the read rate in that time over the disk's limit, which direct reads of whole experts measure for
  two seconds in the same run
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from end_to_end import Clock
from memory_groups import memory_group

import loader
from formats.artifact import Artifact
from formats.model_memory import PROCESS_BYTES
from loader.arithmetic.machine import disk_bytes_per_s

MODES: dict[str, dict[str, Any]] = {
    "engine": {"io": "direct"},
    "no prefetch": {"io": "direct", "prefetch": 0},
    "kernel's map": {"io": "mmap", "prefetch": 0, "ram_cache": "1TiB"},
}


def main() -> None:
    """Run all combinations and print a table, or one JSON object with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a converted folder")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of all modes, in turn")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.folder, **json.loads(options.child))))
        return
    result = measure(options)
    print(json.dumps(result) if options.json else table(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all runs. Return share -> mode -> list of results of `child`."""
    artifact = Artifact.open(options.folder)
    expert_bytes = sum(e.length for layer in artifact.index.layers for e in layer.experts)
    rest = artifact.index.trunk.size_bytes + PROCESS_BYTES
    runs: dict[str, dict[str, list[Any]]] = {}
    limited = False
    for share in options.shares:
        found: dict[str, list[Any]] = {mode: [] for mode in options.modes}
        budget = int(share * expert_bytes)
        for _ in range(options.rounds):
            for mode in options.modes:
                drop_page_cache(options.folder)
                with memory_group(budget + rest) as enter:
                    limited = enter is not None
                    task = {
                        "options": {"ram_cache": budget, **MODES[mode]},
                        "tokens": options.tokens,
                    }
                    found[mode].append(
                        run(options.folder, {**task, "prompt": options.prompt}, enter)
                    )
        runs[f"{share:g}"] = found
    files = [artifact.layer_path(layer) for layer in range(len(artifact.index.layers))]
    return {
        "folder": options.folder.name,
        "expert_bytes": expert_bytes,
        "rest_bytes": rest,
        "limited": limited,
        "disk_gb_s": disk_bytes_per_s(files, artifact.entry(0, 0).length, seconds=2.0) / 1e9,
        "runs": runs,
    }


def child(folder: Path, options: dict[str, Any], tokens: int, prompt: int) -> dict[str, Any]:
    """Measure one run in this process: first the prompt, then the measured decoding."""
    model = loader.from_pretrained(folder, **options)
    ids = torch.randint(
        5, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
    )
    begin: dict[str, Any] = {}

    def begin_to_measure() -> None:
        model.reset_moe_stats()
        begin.update(s=time.perf_counter(), bytes=disk_bytes())

    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens + 1,
            max_new_tokens=tokens + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=Clock(begin_to_measure),
        )
    seconds, read = time.perf_counter() - begin["s"], disk_bytes() - begin["bytes"]
    total = model.moe_stats()
    counted = total.total
    return {
        "tokens_per_s": tokens / seconds,
        "bytes_per_token": read / tokens,
        "missed_bytes_per_token": counted.bytes_read / tokens,
        "wasted_bytes_per_token": counted.wasted_bytes / tokens,
        "hit_ratio": counted.hit_ratio,
        "recall": counted.recall,
        "busy_share": total.busy_s / seconds,
        "wait_share": total.wait_s / seconds,
        "busy_gb_s": (counted.bytes_read + counted.wasted_bytes) / max(total.busy_s, 1e-9) / 1e9,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def run(folder: Path, task: dict[str, Any], enter: Any) -> dict[str, Any]:
    """Run `child` in a process that calls `enter` first."""
    command = [sys.executable, __file__, os.fspath(folder), "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter, check=False)
    if done.returncode:
        raise SystemExit(f"{task}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


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


def table(result: dict[str, Any]) -> str:
    """Return the runs as a table of medians over the rounds."""
    lines = [
        f"{result['folder']}: experts {result['expert_bytes'] / 1e9:.2f} GB, disk "
        f"{result['disk_gb_s']:.2f} GB/s"
        + ("" if result["limited"] else ", memory not limited (no rights to control groups)"),
        f"{'share':>6} {'':13} {'tok/s':>7} {'MB/token':>9} {'x misses':>9} "
        f"{'hits':>6} {'busy':>6} {'x disk':>7}",
    ]
    for share, modes in result["runs"].items():
        for mode, found in modes.items():
            m = {key: sorted(run[key] for run in found)[len(found) // 2] for key in found[0]}
            ours = mode != "kernel's map"
            excess = (
                f"{m['bytes_per_token'] / max(m['missed_bytes_per_token'], 1):9.2f}"
                if ours
                else f"{'':9}"
            )
            busy = (
                f"{m['busy_share']:6.2f} {m['busy_gb_s'] / result['disk_gb_s']:7.2f}"
                if ours
                else ""
            )
            hits = f"{m['hit_ratio']:6.3f}" if ours else f"{'':6}"
            rate, read = m["tokens_per_s"], m["bytes_per_token"] / 1e6
            lines.append(f"{share:>6} {mode:13} {rate:7.2f} {read:9.1f} {excess} {hits} {busy}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
