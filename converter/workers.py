"""The units of work: quantize one expert or one matrix of the trunk, or copy one tensor."""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import xxhash

from converter.calibration import CalibrationPass
from converter.down_correction import DownCorrection
from converter.feedback_reference import SingularStatisticsError
from converter.names import ExpertTensor
from converter.plain_rows import store_rows
from converter.records import ExpertRecord, LinearRecord, ProjectionErrors, TensorRecord
from converter.shards import Stopped
from converter.sizes import OutputPlan, chunk_rows
from converter.solver import CalibratedSolver, Solver, SquaredError, UnfitWeightsError
from converter.source import Checkpoint
from converter.source_tensors import Weight
from converter.statistics import InputStatistics
from formats.checksums import xxh3_of
from formats.expert import split
from formats.packing import AnyPacking, Packing, tile_packing_named
from formats.plain_packing import PlainPacking
from formats.writer import LayerWriter, PlacedFile

PROJECTIONS = ("gate", "up", "down")

_log = logging.getLogger(__name__)


def run_all(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """Results of calibration's tasks, run by the pool's threads, in the tasks' order."""
    futures = [pool.submit(task) for task in tasks]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


class Worker:
    """Does units; safe to use from several threads. Each returns the record that the journal keeps of it."""

    calibration: CalibrationPass | None = None
    """Where there is one, it is prepared for the layer of the units that run."""

    def __init__(self, checkpoint: Checkpoint, plan: OutputPlan, solver: Solver, stop: threading.Event) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._solver = solver
        self._stop = stop

    def expert(self, writer: LayerWriter, layer: int, expert: int) -> ExpertRecord:
        """Quantizes an expert, or copies what stays as it is, and writes it durably."""
        layout = self._plan.layouts[layer][expert]
        blob = torch.empty(layout.n_bytes, dtype=torch.uint8)
        errors: dict[str, SquaredError] = {}
        fallback: list[str] = []
        tokens: int | None = None
        statistics: InputStatistics | None = None
        correction: DownCorrection | None = None
        gate_stored, up_stored, down_stored = split(layout, blob)
        if self.calibration and isinstance(layout.gate_up, Packing):
            self._check_stop()
            statistics, tokens = self.calibration.layer.of_gate_up(expert)
        for projection, stored in zip(PROJECTIONS, (gate_stored, up_stored, down_stored), strict=True):
            weight = self._checkpoint.experts[ExpertTensor(layer, expert, projection)]
            packing = layout.down if projection == "down" else layout.gate_up
            if isinstance(packing, PlainPacking):
                errors[projection] = self._in_chunks(weight, packing, stored, store_rows)
                continue
            if projection == "down" and self.calibration:
                self._check_stop()
                hidden = weight.shape[0]
                gate, up = (partial(_rows, t, layout.gate_up, hidden) for t in (gate_stored, up_stored))
                statistics, correction = self.calibration.layer.of_down(expert, gate, up)
            errors[projection], calibrated = self._quantize(weight, packing, stored, statistics, correction)
            if statistics and not calibrated:
                fallback.append(projection)
        checksums = writer.write_expert(expert, blob)
        return ExpertRecord(layer, expert, *checksums, ProjectionErrors(**errors), tokens, fallback)

    def linear(self, trunk: PlacedFile, module: str) -> LinearRecord:
        """Quantizes a matrix of the trunk and writes it durably."""
        linear = self._plan.packed[module]
        packing = tile_packing_named(linear.packing)
        tiles = torch.empty(packing.stored_shape(linear.rows, linear.columns), dtype=torch.uint8)
        statistics = self.calibration.linear(module) if self.calibration else None
        weight = self._checkpoint.trunk[f"{module}.weight"]
        error, calibrated = self._quantize(weight, packing, tiles, statistics)
        trunk.write(f"{module}.packed", tiles)
        trunk.sync()
        return LinearRecord(module, xxh3_of(tiles.numpy().data), error, bool(statistics) and not calibrated)

    def tensor(self, trunk: PlacedFile, name: str) -> TensorRecord:
        """Copies a tensor as it is, and makes it durable."""
        weight = self._checkpoint.trunk[name]
        rows = weight.shape[0]
        row_bytes = weight.n_bytes // rows
        step = max(1, (32 << 20) // row_bytes)
        checksum = xxhash.xxh3_128()
        for begin in range(0, rows, step):
            self._check_stop()
            block = self._checkpoint.read_rows(weight, begin, min(begin + step, rows))
            self._checkpoint.check_finite(weight, begin, block)
            data = block.view(torch.uint8)
            trunk.write(name, data, begin * row_bytes)
            checksum.update(data.numpy().data)
        trunk.sync()
        return TensorRecord(name, checksum.hexdigest())

    def _quantize(
        self,
        weight: Weight,
        packing: Packing,
        tiles: torch.Tensor,
        statistics: InputStatistics | None,
        correction: DownCorrection | None = None,
    ) -> tuple[SquaredError, bool]:
        """Fills `tiles` (uint8 [tiles, tile_bytes], may be a strided view) with the packed weight, or a corrected one.

        Also returns whether it was with calibration. Where statistics cannot be used, the whole matrix is without.
        """
        if statistics and isinstance(self._solver, CalibratedSolver):
            calibrated = partial(self._solver.solve_calibrated, statistics=statistics)

            def solve(block: torch.Tensor, packing: Packing, tiles: torch.Tensor) -> SquaredError:
                return calibrated(correction.apply(block) if correction else block, packing, tiles)

            try:
                return self._in_chunks(weight, packing, tiles, solve), True
            except SingularStatisticsError as e:
                _log.warning("%s: %s; quantized without calibration", weight.name, e.message)
        return self._in_chunks(weight, packing, tiles, self._solver.solve), False

    def _in_chunks(
        self, weight: Weight, packing: AnyPacking, stored: torch.Tensor, solve: Callable[..., SquaredError]
    ) -> SquaredError:
        rows, columns = weight.shape
        step = chunk_rows(columns)
        total = SquaredError()
        for begin in range(0, rows, step):
            self._check_stop()
            block = self._checkpoint.read_rows(weight, begin, min(begin + step, rows))
            try:
                total += solve(block, packing, _part(stored, packing, begin, begin + len(block)))
            except UnfitWeightsError as e:
                self._checkpoint.check_finite(weight, begin, block)
                raise self._checkpoint.too_large(weight, begin, block, e) from None
        return total

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _rows(stored: torch.Tensor, packing: AnyPacking, columns: int, begin: int, end: int) -> torch.Tensor:
    """Rows begin..end (exclusive; begin a multiple of 32) of a stored matrix, float32 [rows, columns]."""
    return packing.weights(_part(stored, packing, begin, end).contiguous(), end - begin, columns)


def _part(stored: torch.Tensor, packing: AnyPacking, begin: int, end: int) -> torch.Tensor:
    """What holds the matrix's rows begin..end (exclusive; begin a multiple of 32)."""
    return stored[begin // packing.rows_each : -(-end // packing.rows_each)]
