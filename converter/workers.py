"""The units of work: quantize one expert or one matrix of the trunk, or copy one tensor."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from converter.calibration import CalibrationPass
from converter.feedback_reference import SingularStatisticsError
from converter.names import ExpertTensor
from converter.sizes import OutputPlan, chunk_rows
from converter.solver import CalibratedSolver, NonFiniteWeightsError, Solver, SquaredError
from converter.source import Checkpoint, Weight
from converter.statistics import InputStatistics
from formats.expert import split
from formats.packing import TILE_ROWS, Packing, packing_named, tiles_of
from formats.writer import LayerWriter, PlacedFile

PROJECTIONS = ("gate", "up", "down")

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """The conversion is being stopped; the unit was given up."""


class Worker:
    """Does units; safe to use from several threads. Each returns the record that the journal keeps of it."""

    calibration: CalibrationPass | None = None
    """Where there is one, it is prepared for the layer of the units that run."""

    def __init__(self, checkpoint: Checkpoint, plan: OutputPlan, solver: Solver, stop: threading.Event) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._solver = solver
        self._stop = stop

    def expert(self, writer: LayerWriter, layer: int, expert: int) -> dict[str, Any]:
        """Quantizes an expert and writes it durably."""
        layout = self._plan.layouts[layer][expert]
        blob = torch.empty(layout.n_bytes, dtype=torch.uint8)
        errors, fallback, found = {}, [], {}
        if self.calibration:
            self._check_stop()
            gate_up, down, found["calibration_tokens"] = self.calibration.expert(expert)
        for projection, tiles in zip(PROJECTIONS, split(layout, blob), strict=True):
            weight = self._checkpoint.experts[ExpertTensor(layer, expert, projection)]
            packing = layout.down if projection == "down" else layout.gate_up
            statistics = (down if projection == "down" else gate_up) if self.calibration else None
            error, calibrated = self._quantize(weight, packing, tiles, statistics)
            errors[projection] = [error.error, error.total]
            if statistics and not calibrated:
                fallback.append(projection)
        sha256 = writer.write_expert(expert, blob)
        record = {"unit": "expert", "layer": layer, "expert": expert, "sha256": sha256, "errors": errors, **found}
        return record | ({"uncalibrated": fallback} if fallback else {})

    def linear(self, trunk: PlacedFile, module: str) -> dict[str, Any]:
        """Quantizes a matrix of the trunk and writes it durably."""
        linear = self._plan.packed[module]
        packing = packing_named(linear.packing)
        tiles = torch.empty(packing.matrix_bytes(linear.rows, linear.columns), dtype=torch.uint8)
        tiles = tiles.view(-1, packing.tile_bytes(linear.columns))
        statistics = self.calibration.linear(module) if self.calibration else None
        weight = self._checkpoint.trunk[f"{module}.weight"]
        error, calibrated = self._quantize(weight, packing, tiles, statistics)
        trunk.write(f"{module}.packed", tiles)
        trunk.sync()
        record = {"unit": "linear", "module": module, "errors": [error.error, error.total]}
        return record | ({"uncalibrated": True} if statistics and not calibrated else {})

    def tensor(self, trunk: PlacedFile, name: str) -> dict[str, Any]:
        """Copies a tensor as it is, and makes it durable."""
        weight = self._checkpoint.trunk[name]
        rows = weight.shape[0]
        row_bytes = weight.n_bytes // rows
        step = max(1, (32 << 20) // row_bytes)
        for begin in range(0, rows, step):
            self._check_stop()
            block = self._checkpoint.read_rows(weight, begin, min(begin + step, rows))
            self._checkpoint.check_finite(weight, begin, block)
            trunk.write(name, block.view(torch.uint8), begin * row_bytes)
        trunk.sync()
        return {"unit": "tensor", "name": name}

    def _quantize(
        self, weight: Weight, packing: Packing, tiles: torch.Tensor, statistics: InputStatistics | None
    ) -> tuple[SquaredError, bool]:
        """Fills `tiles` (uint8 [tiles, tile_bytes], may be a strided view) with the packed weight.

        Also returns whether it was with calibration. Where statistics cannot be used, the whole matrix is without.
        """
        if statistics and isinstance(self._solver, CalibratedSolver):
            try:
                return self._in_chunks(
                    weight, packing, tiles, partial(self._solver.solve_calibrated, statistics=statistics)
                ), True
            except SingularStatisticsError as e:
                _log.warning("%s: %s; quantized without calibration", weight.name, e.message)
        return self._in_chunks(weight, packing, tiles, self._solver.solve), False

    def _in_chunks(
        self, weight: Weight, packing: Packing, tiles: torch.Tensor, solve: Callable[..., SquaredError]
    ) -> SquaredError:
        rows, columns = weight.shape
        step = chunk_rows(columns)
        total = SquaredError()
        for begin in range(0, rows, step):
            self._check_stop()
            block = self._checkpoint.read_rows(weight, begin, min(begin + step, rows))
            first, n_tiles = begin // TILE_ROWS, tiles_of(len(block))
            try:
                total += solve(block, packing, tiles[first : first + n_tiles])
            except NonFiniteWeightsError:
                self._checkpoint.check_finite(weight, begin, block)
                raise
        return total

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped
