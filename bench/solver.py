"""Speed of the native solver against the hqq package: both on one core, the same bf16 tensor, in one run.

Native: bf16 in memory to packed tiles, S and M rounded. hqq: its Quantizer alone, float32, not packed.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from converter import solver_native
from formats.packing import PACKINGS, Packing


def best_of(runs: int, action: Callable[[], object]) -> float:
    """The shortest of some runs, in seconds: another job on the machine only makes a run longer."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def measure(weight: Tensor, packing: Packing, runs: int, isa: str) -> dict[str, float | str]:
    """Mweights/s of both, their ratio, and the relative squared errors without and with refinement."""
    rows, columns = weight.shape
    mweights = weight.numel() / 1e6
    out = torch.zeros(packing.matrix_bytes(rows, columns), dtype=torch.uint8)  # touched, so no page faults are timed

    def native(refine: bool) -> solver_native.QuantizeError:
        return solver_native.quantize_matrix(weight, packing.name, out, refine=refine, isa=isa)

    def package() -> tuple[Tensor, dict[str, Tensor]]:
        options = {"nbits": packing.nbits, "group_size": packing.group_size}
        result: tuple[Tensor, dict[str, Tensor]] = Quantizer.quantize(
            weight, axis=1, optimize=True, bitpack=False, device="cpu", **options
        )
        return result

    plain, refined = native(False), native(True)
    plain_s = best_of(runs, lambda: native(False))
    package_s = best_of(1, package)
    refined_s = best_of(runs, lambda: native(True))
    return {
        "packing": packing.name,
        "native_mweights_per_s": mweights / plain_s,
        "native_refine_mweights_per_s": mweights / refined_s,
        "hqq_mweights_per_s": mweights / package_s,
        "ratio": package_s / plain_s,
        "relative_squared_error": plain.sum_squared_error / plain.sum_squares,
        "relative_squared_error_refine": refined.sum_squared_error / refined.sum_squares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=7, help="of the native solver; the hqq package runs once")
    parser.add_argument("--isa", choices=list(solver_native.ISAS), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.rows, options.columns, generator=generator).mul_(0.02).to(torch.bfloat16)
    progress = sys.stderr if options.json else sys.stdout
    print(
        f"{solver_native.describe()}; isa {options.isa}; gaussian bf16 [{options.rows}, {options.columns}], 1 thread",
        file=progress,
    )
    print("packing            native  refine   hqq   ratio   relative squared error, refined", file=progress)
    results = []
    for packing in PACKINGS.values():
        r = measure(weight, packing, options.runs, options.isa)
        results.append(r)
        print(
            f"{r['packing']}   {r['native_mweights_per_s']:6.0f}  {r['native_refine_mweights_per_s']:6.0f}"
            f" {r['hqq_mweights_per_s']:5.1f}  {r['ratio']:5.0f}x  {r['relative_squared_error']:.5f}"
            f" {r['relative_squared_error_refine']:.5f}  (Mweights/s)",
            file=progress,
            flush=True,
        )
    if options.json:
        shape = [options.rows, options.columns]
        record = {"bench": "solver", "machine": platform.machine(), "isa": options.isa, "threads": 1}
        print(json.dumps({**record, "shape": shape, "dtype": "bfloat16", "results": results}))


if __name__ == "__main__":
    main()
