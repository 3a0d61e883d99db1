"""The run of a conversion: does the remaining units in several threads and records each."""

import contextlib
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from functools import partial
from itertools import groupby
from typing import Any

import torch

from converter.calibration.calibration_pass import CalibrationPass
from converter.calibration.calibration_text import CalibrationTokens
from converter.calibration.layer_statistics import LayerStatistics
from converter.checkpoint.shards.shard_source import Stopped
from converter.conversion.completion import complete
from converter.conversion.plan import ConversionPlan
from converter.conversion.shard_hashes import ShardHashes
from converter.conversion.units import Unit, shard_needs, units_of
from converter.conversion.worker import Worker, run_all
from converter.journal.finished_work import FinishedWork
from converter.journal.keys import ExpertKey, LinearKey
from converter.journal.records import ExpertRecord, UnitRecord
from converter.output.output_files import OutputFiles
from formats.progress import Progress


def run_conversion(plan: ConversionPlan, progress: Progress) -> dict[str, Any] | None:
    """Do the remaining work and return the value of quality.json, or None for a part."""
    checkpoint = plan.checkpoint
    options = plan.options
    with ExitStack() as stack:
        work = stack.enter_context(closing(FinishedWork(plan.out, plan.fingerprint)))
        hashes = stack.enter_context(ShardHashes(checkpoint, work))
        # The stack unwinds in reverse: stop is set before the hashing thread and the pool are
        # waited for.
        stack.callback(checkpoint.stop.set)
        files = stack.enter_context(
            OutputFiles(plan.out, plan.output, options.codec, work, plan.layers)
        )
        pool = ThreadPoolExecutor(plan.workers, initializer=torch.set_num_threads, initargs=(1,))
        stack.enter_context(pool)
        stack.callback(checkpoint.stop.set)
        _UnitRun(plan, work, files, pool, progress).do_all()
        shard_sha256 = hashes.result()
        return None if options.part else complete(plan, work, files, shard_sha256)


class _UnitRun:
    """The units of one plan; some may be done already."""

    def __init__(
        self,
        plan: ConversionPlan,
        work: FinishedWork,
        files: OutputFiles,
        pool: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._work = work
        self._files = files
        self._pool = pool
        self._progress = progress
        self._stop = plan.checkpoint.stop
        self._worker = Worker(plan.checkpoint, plan.output, plan.solver, self._stop)
        self._units = units_of(
            plan.checkpoint, plan.output, plan.layers, outer=not plan.options.part
        )
        self._total_bytes = sum(unit.source_bytes for unit in self._units)
        self._done_bytes = sum(unit.source_bytes for unit in self._units if unit.key in work)

    def do_all(self) -> None:
        """Do the units that are not done yet."""
        self._progress("converting", self._done_bytes, self._total_bytes)
        for layer in self._plan.layers:
            self._files.finish_layer(layer)
        todo = [unit for unit in self._units if unit.key not in self._work]
        tokens = self._plan.tokens
        self._plan.checkpoint.expect(shard_needs(todo, by_layer=tokens is not None))
        if tokens is None:
            self._do(todo, None)
        else:
            self._do_calibrated(todo, tokens)

    def _do_calibrated(self, todo: list[Unit], tokens: CalibrationTokens) -> None:
        """Do the units layer by layer, with the statistics of one layer at a time in memory."""
        plan = self._plan
        output = plan.output
        width = plan.recipe.options.down_block(plan.checkpoint.architecture.intermediate_size)
        in_pool = partial(run_all, self._pool)
        calibration = CalibrationPass(
            plan.checkpoint, tokens, plan.out, plan.fingerprint, in_pool, width
        )
        for layer, group in groupby(todo, key=lambda unit: unit.layer):
            units = list(group)
            if layer is None:
                has_linear = any(isinstance(unit.key, LinearKey) for unit in units)
                self._do(units, calibration.prepare_head() if has_linear else None)
            elif layer > output.last_quantized_layer:
                self._do(units, None)
            else:
                # A variable would keep these statistics in memory while the next are gathered.
                self._do(units, calibration.prepare(layer, gather=output.quantizes(layer)))
                calibration.finish(layer)

    def _do(self, units: Iterable[Unit], statistics: LayerStatistics | None) -> None:
        """Do units in the pool's threads; record each after its bytes are durable."""
        remaining = iter(units)
        running: dict[Future[UnitRecord], Unit] = {}
        try:
            while True:
                while len(running) < self._plan.workers and (unit := next(remaining, None)):
                    running[self._pool.submit(self._convert, unit, statistics)] = unit
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._record(future.result(), running.pop(future))
        except BaseException:
            self._stop.set()
            _keep_first_error(running)
            raise

    def _convert(self, unit: Unit, statistics: LayerStatistics | None) -> UnitRecord:
        """Do one unit and write its bytes durably.

        statistics: of the unit's layer; None without calibration.
        """
        key = unit.key
        if isinstance(key, ExpertKey):
            expert, data = self._worker.expert(key, statistics)
            self._files.write_expert(key, data)
            return expert
        if isinstance(key, LinearKey):
            linear, tiles = self._worker.linear(
                key, statistics.linears[key.module] if statistics else None
            )
            self._files.write_linear(key, tiles)
            return linear
        return self._files.write_tensor(key, self._worker.tensor(key))

    def _record(self, record: UnitRecord, unit: Unit) -> None:
        self._work.add(record)
        self._plan.checkpoint.done(unit.key)
        self._done_bytes += unit.source_bytes
        if isinstance(record, ExpertRecord):
            self._files.finish_layer(record.layer)
        self._progress("converting", self._done_bytes, self._total_bytes)


def _keep_first_error(running: dict[Future[UnitRecord], Unit]) -> None:
    """Wait for running units and drop their errors, so that the caller raises the first one."""
    for future in running:
        with contextlib.suppress(Stopped, Exception):
            future.result()
