"""Measure a whole conversion: weights per second and core, and peak anonymous memory.

The hqq package quantizes one expert for comparison.

    python bench/make_checkpoint.py /tmp/mixtral-1 --layers 1
    python bench/convert.py /tmp/mixtral-1 --max-workers 2
    python bench/convert.py /tmp/mixtral-1 --solver feedback --no-package

The conversion is the command itself, measured from outside (/proc). --drop-cache empties the page
cache before each conversion and needs root.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from converter.checkpoint.names import ExpertTensor
from converter.checkpoint.source import Checkpoint
from converter.solvers.hqq_package import PackageHqq
from formats.packing import tile_packing_named


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")
    )


def convert(model: Path, recipe: str, solver: str, workers: int) -> dict[str, float]:
    """Convert into a temporary folder next to the model."""
    with tempfile.TemporaryDirectory(dir=model.parent) as out:
        command = [
            sys.executable,
            "-m",
            "converter",
            "convert",
            str(model),
            "-o",
            f"{out}/out",
            "--recipe",
            recipe,
        ]
        command += ["--solver", solver]
        started_s, cpu_before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(
            [*command, "--json", "-q", "--max-workers", str(workers)],
            stdout=subprocess.PIPE,
            text=True,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - started_s
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = cpu.ru_utime + cpu.ru_stime - cpu_before.ru_utime - cpu_before.ru_stime
        if process.returncode:
            sys.exit(process.returncode)
        assert process.stdout
        facts = json.load(process.stdout)
    weights = facts["source_bytes"] / 2
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_s, 2),
        "mweights_per_cpu_second": round(weights / cpu_s / 1e6, 1),
        "source_bytes": facts["source_bytes"],
        "read_mb_per_s": round(facts["source_bytes"] / seconds / 1e6),
        "mweights_per_s": round(weights / seconds / 1e6, 1),
        "mweights_per_s_and_core": round(weights / seconds / 1e6 / workers, 1),
        "peak_anonymous_bytes": peak,
    }


def package(model: Path, packing_name: str) -> float:
    """Mweights/s of the hqq package on one thread, on rows of the same tensors, rounding and
    packing included.
    """
    torch.set_num_threads(1)
    packing, solver = tile_packing_named(packing_name), PackageHqq()
    weights, seconds = 0, 0.0
    with Checkpoint(model) as checkpoint:
        for projection in ("gate", "up", "down"):
            weight = checkpoint.experts[ExpertTensor(0, 0, projection)]
            rows = checkpoint.read_rows(weight, 0, 512)
            tiles = torch.empty(16, packing.tile_bytes(rows.shape[1]), dtype=torch.uint8)
            started_s = time.perf_counter()
            solver.solve(rows, packing, tiles)
            seconds += time.perf_counter() - started_s
            weights += rows.numel()
    return round(weights / seconds / 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", default="2bit")
    parser.add_argument(
        "--solver", default="hqq", help="hqq, refit or feedback (calibrated with the builtin text)"
    )
    parser.add_argument("--no-package", action="store_true", help="do not run the hqq package")
    parser.add_argument("--packing", default="tile32-q2-g16-s4", help="packing for the hqq package")
    parser.add_argument("--max-workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--drop-cache", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    runs, rival = [], []
    for _ in range(options.repeats):
        if options.drop_cache:
            subprocess.run(["sync"], check=True)
            Path("/proc/sys/vm/drop_caches").write_text("1")
        runs.append(convert(options.model, options.recipe, options.solver, options.max_workers))
        rival.append(0.0 if options.no_package else package(options.model, options.packing))
    best = max(runs, key=lambda run: run["mweights_per_s"])
    ratio = round(best["mweights_per_s_and_core"] / max(rival), 1) if max(rival) else None
    if options.json:
        print(
            json.dumps(
                {"conversion": runs, "hqq_package_mweights_per_s_and_core": rival, "ratio": ratio}
            )
        )
        return
    for run, package_rate in zip(runs, rival, strict=True):
        print(
            f"{run['seconds']:.1f} s, {run['cpu_seconds']:.1f} s of CPU time,"
            f" {run['mweights_per_cpu_second']:.1f} Mweights a CPU second,"
            f" {run['mweights_per_s_and_core']:.1f} Mweights/s and core,"
            f" reads {run['read_mb_per_s']:.0f} MB/s, peak anonymous memory"
            f" {run['peak_anonymous_bytes'] / 2**20:.0f} MiB"
            + (f"; hqq package {package_rate:.1f} Mweights/s and core" if package_rate else "")
        )
    if ratio:
        print(f"ratio, best runs: {ratio}")


if __name__ == "__main__":
    main()
