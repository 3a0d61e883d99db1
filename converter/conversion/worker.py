"""A worker: quantizes an expert or a trunk matrix, or reads a tensor to copy."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from converter.calibration.layer_statistics import LayerStatistics
from converter.checkpoint.names import EXPERT_MATRICES, ExpertTensor
from converter.checkpoint.shards.shard_source import Stopped
from converter.checkpoint.source import Checkpoint
from converter.checkpoint.weight import Weight
from converter.input_statistics import InputStatistics
from converter.journal.keys import ExpertKey, LinearKey, TensorKey
from converter.journal.records import ExpertRecord, LinearRecord, ProjectionErrors
from converter.output.conversion_sizes import OutputPlan, chunk_rows
from converter.solver_errors import SingularStatisticsError, UnfitWeightsError
from converter.solvers.down_correction import DownCorrection
from converter.solvers.interface import CalibratedSolver, Solver
from converter.solvers.plain_rows import store_rows
from converter.squared_error import SquaredError
from formats.checksums import Checksums, xxh3_of
from formats.expert import split
from formats.packing import AnyPacking, Packing, PlainPacking, tile_packing_named
from formats.tiles import matrix_weights

_BLOCK_BYTES = 32 << 20

_log = logging.getLogger(__name__)


def run_all(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    """Run calibration's tasks in the pool's threads and return the results in the tasks' order."""
    futures = [pool.submit(task) for task in tasks]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


class Worker:
    """Computes bytes and record of a unit, and writes no file. Several threads may use it."""

    def __init__(
        self, checkpoint: Checkpoint, plan: OutputPlan, solver: Solver, stop: threading.Event
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._solver = solver
        self._stop = stop

    def expert(
        self, key: ExpertKey, calibrated: LayerStatistics | None
    ) -> tuple[ExpertRecord, torch.Tensor]:
        """Quantize an expert, or copy its unquantized projections; return record and bytes (uint8).

        calibrated: statistics of its layer; None without calibration.
        """
        layout = self._plan.layouts[key.layer][key.expert]
        blob = torch.empty(layout.n_bytes, dtype=torch.uint8)
        errors: dict[str, SquaredError] = {}
        fallback: list[str] = []
        tokens: int | None = None
        statistics: InputStatistics | None = None
        correction: DownCorrection | None = None
        gate_stored, up_stored, down_stored = split(layout, blob)
        if calibrated and isinstance(layout.gate_up, Packing):
            self._check_stop()
            statistics, tokens = calibrated.gate_up_statistics(key.expert)
        for projection, stored in zip(
            EXPERT_MATRICES, (gate_stored, up_stored, down_stored), strict=True
        ):
            weight = self._checkpoint.experts[ExpertTensor(key.layer, key.expert, projection)]
            packing = layout.down if projection == "down" else layout.gate_up
            if isinstance(packing, PlainPacking):
                errors[projection] = self._in_chunks(weight, packing, stored, store_rows)
                continue
            if projection == "down" and calibrated:
                self._check_stop()
                hidden = weight.shape[0]
                gate, up = (
                    partial(_rows, t, layout.gate_up, hidden) for t in (gate_stored, up_stored)
                )
                statistics, correction = calibrated.down_statistics(key.expert, gate, up)
            errors[projection], was_calibrated = self._quantize(
                weight, packing, stored, statistics, correction
            )
            if statistics and not was_calibrated:
                fallback.append(projection)
        checksums = Checksums.from_bytes(blob.numpy().data)
        return ExpertRecord(
            key.layer, key.expert, *checksums, ProjectionErrors(**errors), tokens, fallback
        ), blob

    def linear(
        self, key: LinearKey, statistics: InputStatistics | None
    ) -> tuple[LinearRecord, torch.Tensor]:
        """Quantize a trunk matrix; return its record and its bytes (uint8).

        statistics: of its inputs; None without calibration.
        """
        linear = self._plan.packed[key.module]
        packing = tile_packing_named(linear.packing)
        tiles = torch.empty(packing.stored_shape(linear.rows, linear.columns), dtype=torch.uint8)
        weight = self._checkpoint.trunk[f"{key.module}.weight"]
        error, calibrated = self._quantize(weight, packing, tiles, statistics)
        uncalibrated = bool(statistics) and not calibrated
        return LinearRecord(key.module, xxh3_of(tiles.numpy().data), error, uncalibrated), tiles

    def tensor(self, key: TensorKey) -> Iterator[torch.Tensor]:
        """Yield the bytes (uint8) of a copied tensor in blocks: it may be larger than an expert."""
        weight = self._checkpoint.trunk[key.name]
        rows = weight.shape[0]
        row_bytes = weight.n_bytes // rows
        step = max(1, _BLOCK_BYTES // row_bytes)
        for begin in range(0, rows, step):
            self._check_stop()
            block = self._checkpoint.read_rows(weight, begin, min(begin + step, rows))
            self._checkpoint.check_finite(weight, begin, block)
            yield block.view(torch.uint8)

    def _quantize(
        self,
        weight: Weight,
        packing: Packing,
        tiles: torch.Tensor,
        statistics: InputStatistics | None,
        correction: DownCorrection | None = None,
    ) -> tuple[SquaredError, bool]:
        """Fill `tiles` with the packed weight; return the error, and True if calibrated.

        tiles: uint8 [tiles, tile_bytes], perhaps a strided view. correction: applied to the weight
        first. If the statistics are singular, the whole matrix is quantized without calibration.
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
        self,
        weight: Weight,
        packing: AnyPacking,
        stored: torch.Tensor,
        solve: Callable[..., SquaredError],
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


def _rows(
    stored: torch.Tensor, packing: AnyPacking, columns: int, begin: int, end: int
) -> torch.Tensor:
    """Return rows begin..end (exclusive) of a stored matrix, float32 [rows, columns].

    begin: a multiple of 32.
    """
    return matrix_weights(
        packing, _part(stored, packing, begin, end).contiguous(), end - begin, columns
    )


def _part(stored: torch.Tensor, packing: AnyPacking, begin: int, end: int) -> torch.Tensor:
    """Return the tiles or plain rows that hold rows begin..end (exclusive) of the matrix.

    begin: a multiple of 32.
    """
    return stored[begin // packing.rows_each : -(-end // packing.rows_each)]
