"""Measure a calibration pass alone: time of each layer, and peak anonymous memory above the amount
before it.

    python bench/make_checkpoint.py /tmp/mixtral-2 --shape 8x7b --layers 2
    python bench/calibration.py /tmp/mixtral-2 --workers 2

Nothing is quantized: the statistics of each layer are gathered and dropped. "estimated" is the
memory that a conversion's plan counts.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from convert import anonymous_bytes

from converter.calibration.calibration_pass import CalibrationPass
from converter.calibration.calibration_text import calibration_tokens
from converter.calibration.pass_memory import calibration_memory_bytes
from converter.checkpoint.source import Checkpoint
from converter.conversion.worker import run_all
from converter.recipe.recipes import make_recipe


class PeakMemory:
    """The largest anonymous memory of this process while the context is open, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.most = anonymous_bytes(os.getpid())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, anonymous_bytes(os.getpid()))


def measure(model: Path, tokens: int, workers: int, width: int | None) -> dict[str, Any]:
    """Gather the statistics of all layers.

    Return seconds of each layer, peak memory in bytes, and the plan's estimate of it.
    """
    recipe = make_recipe(solver="feedback", down_width=width)
    seconds, cpu_seconds = [], []
    with Checkpoint(model) as checkpoint, tempfile.TemporaryDirectory() as scratch:
        drawn = calibration_tokens(checkpoint, "builtin", tokens)
        columns = recipe.options.down_block(checkpoint.architecture.intermediate_size)
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        with pool, PeakMemory() as memory:
            passes = CalibrationPass(
                checkpoint, drawn, Path(scratch), "bench", partial(run_all, pool), columns
            )
            for layer in range(len(checkpoint.shape.decoder_layers)):
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                passes.prepare(layer)
                seconds.append(round(time.perf_counter() - wall_s, 1))
                cpu_seconds.append(round(time.process_time() - cpu_s, 1))
        whole, each = calibration_memory_bytes(
            checkpoint.architecture, drawn.windows.numel(), columns
        )
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": memory.most - memory.before,
        "estimated_bytes": whole + workers * each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--down-width", type=int, help="--down-width of convert")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.model, options.tokens, options.workers, options.down_width)
    if options.json:
        print(json.dumps(found))
        return
    for layer, (wall_s, cpu_s) in enumerate(
        zip(found["seconds"], found["cpu_seconds"], strict=True)
    ):
        print(f"layer {layer}: {wall_s} s, {cpu_s} s of CPU time")
    print(
        f"{found['peak_bytes'] / 2**20:.0f} MiB; estimated "
        f"{found['estimated_bytes'] / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
