"""Measure the native solver against the hqq package: both on one core, the same bf16 tensor, in one
run.

Native: bf16 in memory to packed tiles. hqq: its Quantizer alone, float32, not packed. Feedback: in
blocks of 256 columns with the exact gain, and at full width with the low-rank gain; factorization
is not included, but reported separately.
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

from converter.solvers.native import feedback_native, hqq_native, solver_library
from converter.squared_error import SquaredError
from formats.native.abi import ISAS
from formats.packing import PACKINGS, Packing
from formats.tiles import dequantize, unpack


def best_of(runs: int, action: Callable[[], object]) -> float:
    """Return the shortest of some runs, in CPU seconds of this process.

    CPU time depends less on other jobs on the machine than wall time.
    """
    times = []
    for _ in range(runs):
        begin = time.process_time()
        action()
        times.append(time.process_time() - begin)
    return min(times)


def correlated_hessian(columns: int) -> Tensor:
    """float32 [columns, columns], of inputs with a mean, channels of all sizes, and columns / 4
    latent directions.
    """
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns // 4, columns, generator=generator) / (columns // 4) ** 0.5
    inputs = torch.randn(2 * columns, columns // 4, generator=generator) @ mix
    inputs += 0.3 * torch.randn(2 * columns, columns, generator=generator)
    inputs = inputs * torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs += 0.3 * torch.randn(columns, generator=generator)
    hessian: Tensor = inputs.T @ inputs / len(inputs)
    return hessian


def diagonal_blocks(hessian: Tensor, size: int = 256) -> Tensor:
    """[blocks, size, size]; columns must be a multiple of size."""
    return torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])


class Subject:
    """A weight, its Hessian, and the Hessian's factors."""

    def __init__(self, rows: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(rows, columns, generator=generator).mul_(0.02).to(torch.bfloat16)
        self.hessian = correlated_hessian(columns)
        self.blocks = diagonal_blocks(self.hessian)
        self.factorize_s = best_of(1, lambda: feedback_native.hessian_factor(self.hessian))
        self.factorize_blocks_s = best_of(1, lambda: feedback_native.hessian_factor(self.blocks))
        self.factor = feedback_native.hessian_factor(self.hessian)
        self.factor_blocks = feedback_native.hessian_factor(self.blocks)
        self.metric_s = best_of(1, lambda: feedback_native.gain_metric(self.factor))
        self.metric = feedback_native.gain_metric(self.factor)

    def measure(self, packing: Packing, runs: int, isa: str) -> dict[str, float | str]:
        """Return Mweights/s of each way, and relative squared errors.

        Errors are plain and in the Hessian's metric.
        """
        weight, mweights = self.weight, self.weight.numel() / 1e6
        # Touched, so that no page faults are timed.
        out = torch.zeros(packing.matrix_bytes(*weight.shape), dtype=torch.uint8)

        def plain(refit: bool) -> SquaredError:
            return hqq_native.quantize_matrix(weight, packing.name, out, refit=refit, isa=isa)

        def in_blocks() -> feedback_native.FeedbackErrors:
            return feedback_native.quantize_feedback(
                weight, packing.name, out, self.factor_blocks, self.blocks, isa=isa
            )

        def full_width() -> feedback_native.FeedbackErrors:
            return feedback_native.quantize_feedback(
                weight,
                packing.name,
                out,
                self.factor,
                self.hessian,
                exact_gain=False,
                metric=self.metric,
                isa=isa,
            )

        def package() -> object:
            options = {"nbits": packing.nbits, "group_size": packing.group_size}
            return Quantizer.quantize(
                weight, axis=1, optimize=True, bitpack=False, device="cpu", **options
            )

        ways: dict[str, Callable[[], object]] = {
            "native": lambda: plain(False),
            "refit": lambda: plain(True),
            "blocks": in_blocks,
            "full": full_width,
        }
        result: dict[str, float | str] = {"packing": packing.name}
        for name, way in ways.items():
            result[f"{name}_mweights_per_s"] = mweights / best_of(runs, way)
            result[f"{name}_hessian_error"] = self.hessian_error(out, packing)
        result["hqq_mweights_per_s"] = mweights / best_of(1, package)
        return result

    def hessian_error(self, out: Tensor, packing: Packing) -> float:
        """e^T H e / w^T H w of the packed tiles, H undamped and of full width."""
        rows, columns = self.weight.shape
        weight = self.weight.float()
        off = weight - dequantize(
            unpack(out.view(-(-rows // 32), -1), packing, rows, columns), packing.group_size
        )
        return float(((off @ self.hessian) * off).sum() / ((weight @ self.hessian) * weight).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096, help="columns, a multiple of 256")
    parser.add_argument(
        "--runs", type=int, default=5, help="runs of the native solver; the hqq package runs once"
    )
    parser.add_argument("--isa", choices=list(ISAS), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = Subject(options.rows, options.columns)
    progress = sys.stderr if options.json else sys.stdout
    print(
        f"{solver_library.describe()}; isa {options.isa}; "
        f"gaussian bf16 [{options.rows}, {options.columns}], 1 thread\n"
        f"factorization: full width {subject.factorize_s:.2f} s and {subject.metric_s:.2f} s "
        f"for the gain's metric, "
        f"blocks of 256 {subject.factorize_blocks_s:.2f} s\n"
        "                  Mweights/s                      "
        "          error in the Hessian's metric\n"
        "packing            package  native  refit  blocks   full "
        "    native   refit  blocks    full",
        file=progress,
    )
    ways, results = ("native", "refit", "blocks", "full"), []
    for packing in PACKINGS.values():
        r = subject.measure(packing, options.runs, options.isa)
        results.append(r)
        speeds = "  ".join(f"{r[f'{name}_mweights_per_s']:6.1f}" for name in ways)
        errors = " ".join(f"{r[f'{name}_hessian_error']:7.5f}" for name in ways)
        print(
            f"{r['packing']}   {r['hqq_mweights_per_s']:6.1f}  {speeds}   {errors}",
            file=progress,
            flush=True,
        )
    if options.json:
        record = {
            "bench": "solver",
            "machine": platform.machine(),
            "isa": options.isa,
            "threads": 1,
            "shape": [options.rows, options.columns],
            "dtype": "bfloat16",
            "factorize_s": subject.factorize_s,
            "gain_metric_s": subject.metric_s,
            "factorize_blocks_s": subject.factorize_blocks_s,
        }
        print(json.dumps({**record, "results": results}))


if __name__ == "__main__":
    main()
