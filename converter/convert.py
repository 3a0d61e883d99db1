"""Converting: units of work over threads, journaled, in any order, to the same bytes."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from converter import calibration
from converter.bit_budget import TARGET
from converter.checkpoint.model_shape import HEAD
from converter.convert_options import ConvertOptions
from converter.finished_work import FinishedWork
from converter.hub_model import HubModel
from converter.identity import Progress, check_contents, check_same, fingerprint
from converter.index_assembly import assemble_index
from converter.model_card import write_card
from converter.output_folder import SOURCE_FOLDER, OutputFolder
from converter.preflight import Preflight, check_conversion
from converter.records import ExpertRecord, LinearRecord, Record, RecordKey, ShardRecord, TensorRecord
from converter.shards import Stopped
from converter.side_files import copy_files, write_config
from converter.sizes import OutputPlan, plan_output
from converter.source import Checkpoint
from converter.target_bits import with_chosen_bits
from converter.weight_errors import write_quality
from converter.workers import Worker, run_all
from formats import EXPERTS_FOLDER, INDEX_NAME
from formats.index import Recipe, dump_index
from formats.io_errors import translated
from formats.output_file import fsync_folder
from formats.writer import LayerWriter, PlacedFile, write_file

__all__ = ["ConvertOptions", "Converted", "convert_checkpoint"]

UnitRecord = ExpertRecord | LinearRecord | TensorRecord
Unit = tuple[RecordKey, int, Callable[[], UnitRecord]]
"""(key of its record, bytes of the source that it reads, the work)"""


@dataclass(frozen=True)
class Converted:
    """What a conversion came to. `done` is "converted", "already complete" or "part"."""

    done: str
    plan: OutputPlan
    source_bytes: int
    quality: dict[str, Any]
    recipe: Recipe
    """With the rules of bits that were chosen for its target, if it has one."""


def convert_checkpoint(
    source: Path | HubModel,
    out: Path,
    recipe: Recipe,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Converts the checkpoint in a folder or Hub repository into folder `out`; goes on where an earlier run stopped.

    Memory stays bounded by workers × one expert, and with calibration by the activations of its tokens. The result
    depends on weights, recipe, calibration text, codec and code version only.
    Raises SourceError, HubError, OutputError, PathError, DoesNotFitError; after any of them nothing that was converted
    is lost.
    """
    with translated(out, "used"):
        return _convert(source, out, recipe, options or ConvertOptions(), progress)


def _convert(
    source: Path | HubModel, out: Path, recipe: Recipe, options: ConvertOptions, progress: Progress | None
) -> Converted:
    with Checkpoint(source) as checkpoint:
        checked = check_conversion(checkpoint, recipe, options, out)
        folder = OutputFolder(out, checked.needs, force=options.force)
        try:
            if options.force or not (options.resume or folder.complete):
                folder.discard()
            if folder.complete:
                index = check_same(folder.path, checkpoint, recipe, options.codec, checked.tokens)
                check_contents(folder.path, checkpoint, index, progress)
                plan = plan_output(checkpoint, index.recipe)
                return Converted("already complete", plan, checkpoint.n_bytes, {}, index.recipe)
            checkpoint.fetch_into(folder.path / SOURCE_FOLDER)
            with _one_torch_thread():
                if TARGET in recipe.options and checked.tokens:
                    recipe = with_chosen_bits(checkpoint, recipe, checked.tokens, out, checked.workers, progress)
                    checked = replace(checked, plan=plan_output(checkpoint, recipe))
                quality = _Job(checkpoint, checked, recipe, folder.path, options, progress).run()
            done = "converted" if quality else "part"
            return Converted(done, checked.plan, checkpoint.n_bytes, quality or {}, recipe)
        finally:
            folder.close()


class _Job:
    def __init__(
        self,
        checkpoint: Checkpoint,
        checked: Preflight,
        recipe: Recipe,
        out: Path,
        options: ConvertOptions,
        progress: Progress | None,
    ) -> None:
        plan, self._side_files = checked.plan, checked.side_files
        self._checkpoint, self._plan, self._recipe = checkpoint, plan, recipe
        self._out, self._options, self._progress = out, options, progress or (lambda stage, done, total: None)
        self._solver, self._tokens, self._workers = checked.solver, checked.tokens, checked.workers
        made_from = fingerprint(checkpoint, recipe, options.codec, self._solver, self._tokens)
        self._work = FinishedWork(out, plan, made_from)
        self._pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,))
        self._stop = checkpoint.stop
        self._worker = Worker(checkpoint, plan, self._solver, self._stop)
        if self._tokens:
            self._worker.calibration = calibration.CalibrationPass(
                checkpoint,
                self._tokens,
                out,
                made_from,
                partial(run_all, self._pool),
                calibration.down_width(recipe, checkpoint.architecture),
            )
        self._done_bytes = 0
        n, (i, parts) = len(plan.layouts), options.part or (1, 1)
        self._layers = range(n * (i - 1) // parts, n * i // parts)

    def run(self) -> dict[str, Any] | None:
        """Does what is left; returns the value of quality.json, or None if only a part was asked for."""
        writers: dict[int, LayerWriter] = {}
        trunk = self._work.open_trunk()
        hashing = threading.Thread(target=self._hash_shards, daemon=True)
        self._shard_error: BaseException | None = None
        self._shard_sha256: dict[str, str] = {}
        hashing.start()
        try:
            units = list(self._units(writers, trunk))
            self._run_units(units, writers)
            hashing.join()
            if self._shard_error:
                raise self._shard_error
            if self._options.part:
                return None
            return self._complete(trunk)
        finally:
            self._stop.set()
            self._pool.shutdown()
            hashing.join()
            for writer in writers.values():
                writer.close()
            trunk.close()
            self._work.close()

    def _units(self, writers: dict[int, LayerWriter], trunk: PlacedFile) -> Iterator[Unit]:
        """(key, source bytes, work) of every unit, in the order in which checkpoints store them."""
        shape = self._checkpoint.shape
        if not self._options.part:
            yield from self._trunk_units(trunk, lambda name: name == shape.embedding)
        begin = shape.experts[self._layers[0] - 1].decoder_layer + 1 if self._layers and self._layers[0] else 0
        for layer in self._layers:
            writer = self._work.open_layer(layer)
            if writer:
                writers[layer] = writer
            end = shape.experts[layer].decoder_layer
            for dense in range(begin, end):
                yield from self._decoder_units(trunk, dense, [])
            yield from self._decoder_units(trunk, end, self._expert_units(layer, writer))
            begin = end + 1
        if self._layers and self._layers[-1] == len(shape.experts) - 1:
            for dense in range(begin, len(shape.decoder_layers)):
                yield from self._decoder_units(trunk, dense, [])
        if not self._options.part:
            yield from self._trunk_units(
                trunk, lambda name: name != shape.embedding and shape.decoder_layer(name) is None
            )

    def _decoder_units(self, trunk: PlacedFile, layer: int, experts: Iterable[Unit]) -> list[Unit]:
        """The units of a decoder layer in the order of their bytes."""
        shape = self._checkpoint.shape
        units = [*self._trunk_units(trunk, lambda name: shape.decoder_layer(name) == layer), *experts]
        return sorted(units, key=lambda unit: self._checkpoint.place(unit[0]))

    def _expert_units(self, layer: int, writer: LayerWriter | None) -> Iterator[Unit]:
        experts = self._checkpoint.experts
        for expert in range(len(self._plan.layouts[layer])):
            size = sum(w.n_bytes for key, w in experts.items() if (key.layer, key.expert) == (layer, expert))
            # Without a writer the layer is complete, and the unit is only counted.
            yield ("expert", layer, expert), size, partial(self._worker.expert, writer, layer, expert)  # type: ignore[arg-type]

    def _trunk_units(self, trunk: PlacedFile, chosen: Callable[[str], bool]) -> Iterator[Unit]:
        """The units of the trunk's tensors whose names in the model are chosen: matrices to pack, then copies."""
        weights = self._checkpoint.trunk
        for module in self._plan.packed:
            if chosen(f"{module}.weight"):
                size = weights[f"{module}.weight"].n_bytes
                yield ("linear", module), size, partial(self._worker.linear, trunk, module)
        for entry in self._plan.trunk_entries:
            if entry.name in weights and chosen(entry.name):
                work = partial(self._worker.tensor, trunk, entry.name)
                yield ("tensor", entry.name), weights[entry.name].n_bytes, work

    def _run_units(self, units: list[Unit], writers: dict[int, LayerWriter]) -> None:
        self._total_bytes = sum(size for _, size, _ in units)
        self._done_bytes = sum(size for key, size, _ in units if key in self._work)
        self._progress("converting", self._done_bytes, self._total_bytes)
        for layer in self._layers:
            self._finish_layer(layer, writers)
        todo = [unit for unit in units if unit[0] not in self._work]
        passes = self._worker.calibration
        self._checkpoint.expect([key for key, _, _ in todo], by_layer=passes is not None)
        if passes is None:
            self._run_todo(todo, writers)
            return
        # Layer by layer: the statistics of one layer at a time are in memory.
        for of_layer, group in groupby(todo, key=lambda unit: self._checkpoint.layer_of(unit[0])):
            if of_layer is None:
                rest = list(group)
                if any(key == ("linear", HEAD) for key, _, _ in rest):
                    passes.prepare_head()
                self._run_todo(rest, writers)
            elif of_layer > self._plan.last_quantized_layer:
                self._run_todo(list(group), writers)
            else:
                passes.prepare(of_layer, gather=self._plan.quantizes(of_layer))
                self._run_todo(list(group), writers)
                passes.finish(of_layer)

    def _run_todo(self, units: list[Unit], writers: dict[int, LayerWriter]) -> None:
        todo = iter(units)
        running: dict[Future[UnitRecord], int] = {}
        try:
            while True:
                while len(running) < self._workers and (unit := next(todo, None)):
                    running[self._pool.submit(unit[2])] = unit[1]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    record = future.result()
                    self._record(record)
                    self._done_bytes += running.pop(future)
                    if isinstance(record, ExpertRecord):
                        self._finish_layer(record.layer, writers)
                    self._progress("converting", self._done_bytes, self._total_bytes)
        except BaseException:
            self._stop.set()
            _keep_first_error(running)
            raise

    def _record(self, record: Record) -> None:
        self._work.add(record)
        self._checkpoint.done(record.key)

    def _finish_layer(self, layer: int, writers: dict[int, LayerWriter]) -> None:
        """Once all experts of a layer are there: gives its file its name."""
        if layer in writers and self._work.has_experts(layer):
            self._work.finish_layer(writers.pop(layer), layer, self._options.codec)

    def _hash_shards(self) -> None:
        """Hashes the source's shards beside the work; what it reads ahead, the workers find in the page cache."""
        try:
            for name in self._checkpoint.shards:
                recorded = self._work.shard_sha256(name)
                self._shard_sha256[name] = recorded or self._checkpoint.shard_sha256(name, self._stop)
        except BaseException as e:
            self._shard_error = e

    def _complete(self, trunk: PlacedFile) -> dict[str, Any]:
        """Trunk, side files, and last the index."""
        for name in self._checkpoint.shards:
            if ("shard", name) not in self._work:
                self._work.add(ShardRecord(name, self._shard_sha256[name]))
        trunk.finish()
        out, recipe = self._out, self._recipe
        files = [
            write_config(self._checkpoint, recipe, out),
            *copy_files(self._checkpoint.folder, self._side_files, out),
        ]
        quality = write_quality(self._work.records, out)
        index = assemble_index(
            self._checkpoint,
            self._shard_sha256,
            recipe,
            self._plan,
            self._options.codec,
            self._solver,
            self._tokens,
            trunk,
            [record for layer in range(len(self._plan.layouts)) if (record := self._work.layer(layer))],
            files,
        )
        write_card(out, index)
        # Partial files that were removed stay removed.
        fsync_folder(out / EXPERTS_FOLDER)
        write_file(out / INDEX_NAME, dump_index(index))
        return quality


def _keep_first_error(running: dict[Future[UnitRecord], int]) -> None:
    """Lets running units end; of several that failed, the one that did so by itself is what the caller raises."""
    for future in running:
        with contextlib.suppress(Stopped, Exception):
            future.result()


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Sums over a tensor depend on torch's threads, and so would where hqq stops: one thread, more workers instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
