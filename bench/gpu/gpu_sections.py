"""Measure link, kernels and whole model on a GPU in one command.

Prints each row when it is measured; --json stores them.

check     small experts in every packing, compared with the reference
link      GB/s of single copies of an expert from page-locked RAM
overlap   copies while experts are computed: time of both over the longer of the two alone
          (1: neither slows the other)
kernels   a layer's two experts and its attention in every packing, no weight twice from a cache:
          packed bytes read per second, in turn with a copy within the GPU (bytes read and
          written); prompts by weights times tokens
decode    tokens per second with 2, 4, 6 of 8 slots a layer, with and without prefetch and CPU
          share, in turn (A B A B), and relative to the link's limit:
          link / (misses per token · bytes per expert)
gaps      time per layer in which neither a kernel nor a copy runs, from the profiler
resident  all experts on the GPU

Needs Linux, an NVIDIA GPU of compute capability 7.0 or newer with 6 GB free, its driver, this
repository's requirements, and torch from a CUDA wheel for that driver. It needs no compiler, CUDA
toolkit or network. Without the native library of `pip install .`, decode omits the CPU share.

The default is 4 layers of Mixtral-8x7B's shape with random weights: 2 GB of disk (--work keeps them
for the next run), 12 GB of RAM, 4 of them page-locked. Each further layer takes 0.5 GB of disk, 0.9
GB of RAM and 0.7 GB of the GPU. Estimated, not measured: 5 to 10 minutes. Exit code: 0 if
everything was measured, 1 without a GPU, 2 if a section failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_clock import EventClock
from gpu_decode import PAIRS, Decoding, compare, loaded, profile, resident
from gpu_kernels import DeviceCopy, beside_copy, kernels, link, overlap, ring_bytes
from gpu_report import SMI_FIELDS, Row, bars, line, parse_smi
from make_checkpoint import SHAPES
from make_folder import kept_folder

import loader
from formats.errors import MoeConvertError
from formats.expert import ExpertLayout
from formats.packing import PACKINGS
from loader.arithmetic import kernels as native
from loader.cuda.device.torch_device import CudaDevice
from loader.cuda.device_choice import choose_devices
from loader.cuda.products.self_check import check_products

SHAPE = SHAPES["8x7b"]
LAYOUT = ExpertLayout(SHAPE.hidden, SHAPE.intermediate, *[PACKINGS["tile32-q2-g16-s4"]] * 2)
"""Of an expert of the recipe 2bit."""
DECODED_WITH = 4
"""Slots a layer in section gaps."""


class Bench:
    """The sections, each a method of that name that gives rows."""

    def __init__(self, device: CudaDevice, options: argparse.Namespace) -> None:
        self.device, self.options, self.clock = device, options, EventClock(device.index)
        self.decoding = Decoding(options.tokens, options.prompt)

    def machine(self) -> Iterator[Row]:
        """Return the GPU, its driver, torch, and nvidia-smi's state of the link under load."""
        properties = torch.cuda.get_device_properties(self.device.index)
        self._link()
        yield {
            "gpu": properties.name,
            "capability": ".".join(map(str, self.device.capability)),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cpus": os.cpu_count(),
            "cpu_kernels": native.describe(),
            **nvidia_smi(str(getattr(properties, "uuid", ""))),
        }

    def check(self) -> Iterator[Row]:
        check_products(self.device, PACKINGS)
        yield {"right": list(PACKINGS)}

    def link(self) -> Iterator[Row]:
        yield self._link()

    def overlap(self) -> Iterator[Row]:
        yield overlap(self.device, self.clock, LAYOUT, ring_bytes(self.device))

    def kernels(self) -> Iterator[Row]:
        return kernels(
            self.device, self.clock, SHAPE, list(PACKINGS.values()), ring_bytes(self.device)
        )

    def decode(self) -> Iterator[Row]:
        load = self._load()
        names = [name for name in PAIRS if native.available() or "CPU share" not in name]
        for count in self.options.slots:
            slots = [count] * self.options.layers
            yield from compare(
                load,
                self.decoding,
                slots,
                names,
                LAYOUT.n_bytes,
                lambda: 1e9 * self._link()["gb_s"],
                self.options.rounds,
            )

    def gaps(self) -> Iterator[Row]:
        load = self._load()
        for count in (DECODED_WITH, SHAPE.experts):
            with loaded(
                load, slots=[count] * self.options.layers, prefetch="auto", cpu_share="off"
            ) as model:
                rows = profile(model, self.decoding)
            del model
            gc.collect()
            if not rows:
                raise MoeConvertError("the profiler's trace has no whole tokens of the fused path")
            yield from ({"slots": count, **row} for row in rows)

    def resident(self) -> Iterator[Row]:
        copy = DeviceCopy(self.device)
        copied = beside_copy(self.clock, copy, copy.calls, copy.n_bytes, copy, 5)["copy_gb_s"]
        del copy
        with loaded(
            self._load(), slots=[SHAPE.experts] * self.options.layers, prefetch=0, cpu_share="off"
        ) as model:
            yield resident(model, self.decoding, LAYOUT.n_bytes, copied, self.options.rounds)

    def _link(self) -> Row:
        return link(self.device, self.clock, LAYOUT.n_bytes)

    def _load(self) -> Callable[..., Any]:
        folder = kept_folder(self.options.work, self.options.layers)
        return partial(loader.from_pretrained, folder, device=self.device, ram_cache="1TiB")


SECTIONS = ("check", "link", "overlap", "kernels", "decode", "gaps", "resident")


def nvidia_smi(uuid: str) -> dict[str, str]:
    """Return SMI_FIELDS of the GPU; empty if nvidia-smi is missing or does not know them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_smi(done.stdout, uuid)


def run(
    sections: Iterable[tuple[str, Callable[[], Iterable[Row]]]],
    result: Row,
    store: Callable[[], None],
) -> bool:
    """Print each section's rows and store them in `result`; return True if all sections succeeded.

    A failed section is reported, and the next one begins: the machine may be available only once.
    """
    well = True
    for name, section in sections:
        begin = time.perf_counter()
        rows = result[name] = []
        try:
            for row in section():
                rows.append(row)
                print(line(name, row), flush=True)
        # Whatever it is: nothing of the other sections must be lost.
        except Exception as error:
            well = False
            result.setdefault("failed", {})[name] = "".join(traceback.format_exception(error))
            print(f"{name:9} FAILED: {error}", flush=True)
        result.setdefault("seconds", {})[name] = time.perf_counter() - begin
        gc.collect()
        store()
    return well


def cuda_name(text: str) -> str:
    """Return `text` if it is the name of one GPU."""
    if text != "cuda" and not text.removeprefix("cuda:").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a GPU: cuda, or cuda:0 and so on")
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=cuda_name, default="cuda:0")
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the made model (default: 4)"
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="sections to run (default: all)",
    )
    parser.add_argument(
        "--slots",
        type=int,
        nargs="+",
        default=[2, 4, 6],
        help="slots of 8 in each layer (default: 2 4 6)",
    )
    parser.add_argument(
        "--tokens", type=int, default=64, help="tokens to decode in each run (default: 64)"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default: 32)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each pair (default: 4)")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "moe-convert-bench"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all rows to FILE after each section"
    )
    return parser.parse_args()


def main() -> int:
    """Run the sections and return the exit code."""
    options = parse()
    try:
        (device,) = choose_devices(options.device, ())
    except (MoeConvertError, RuntimeError) as error:
        why = error.message if isinstance(error, MoeConvertError) else error
        print(
            f"bench/gpu/run.py measures an NVIDIA GPU, and none can be used here: {why}",
            file=sys.stderr,
        )
        print(
            "It needs one of compute capability 7.0 or newer, its driver, torch from a CUDA wheel.",
            file=sys.stderr,
        )
        return 1
    assert isinstance(device, CudaDevice)
    torch.cuda.set_device(device.index)
    bench = Bench(device, options)
    result: Row = {"layers": options.layers, "expert_bytes": LAYOUT.n_bytes}

    def store() -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))

    well = run(
        [(name, getattr(bench, name)) for name in ("machine", *options.sections)], result, store
    )
    found = bars(result)
    result["bars"] = [bar._asdict() | {"met": bar.met} for bar in found]
    print(*found, sep="\n")
    store()
    return 0 if well else 2
