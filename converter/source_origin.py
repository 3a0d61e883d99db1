"""The source checkpoint as the origin of repairs: it converts experts again by the same recipe."""

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import zstandard

from converter.calibration.calibration_pass import CalibrationPass
from converter.calibration.calibration_text import calibration_tokens
from converter.calibration.layer_statistics import LayerStatistics
from converter.checkpoint.adapters.adapter_folder import AdapterFolder, other_adapters
from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.conversion.units import Unit, units_of
from converter.conversion.worker import Worker
from converter.forward.ordered_tasks import one_by_one
from converter.journal.keys import ExpertKey, LinearKey, TensorKey
from converter.output.conversion_sizes import plan_output
from converter.output.output_files import write_linear, write_tensor
from converter.output.source_side_files import copied_bytes, side_files_of
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_options import RecipeOptions
from converter.solvers.registry import choose_solver
from converter.torch_threads import one_torch_thread
from formats import TRUNK_NAME
from formats.errors import MoeConvertError, SourceError
from formats.files.output_file import remove
from formats.files.partial_file import partial_path, write_file
from formats.index import ExpertEntry, Index
from formats.repair.repairs import Origin
from formats.writer import ZSTD_LEVEL, PlacedFile


class SourceOrigin(Origin):
    """The checkpoint from which the folder of `index` was converted. Use it as a context.

    It converts by the index's recipe. Ask for experts layer by layer, ascending: with calibration,
    the tokens go through the earlier layers first. calibration_file: the user's text, if the folder
    was calibrated with one. adapters: those that the index names. Raises SourceError, RecipeError,
    HubError.
    """

    def __init__(
        self,
        source: Path | HubModel,
        index: Index,
        calibration_file: Path | None = None,
        adapters: Sequence[AdapterFolder] = (),
    ) -> None:
        self._index = index
        if difference := other_adapters(index.source.adapters, adapters):
            raise SourceError(*difference)
        self._checkpoint = Checkpoint(source, adapters)
        self._solver = choose_solver(index.recipe.solver)
        recipe = ConversionRecipe.read(index.recipe)
        self._plan = plan_output(self._checkpoint, recipe)
        self._worker = Worker(self._checkpoint, self._plan, self._solver, threading.Event())
        layers = range(len(self._plan.layouts))
        self._units = {
            unit.key: unit for unit in units_of(self._checkpoint, self._plan, layers, outer=True)
        }
        self._scratch = tempfile.TemporaryDirectory(prefix="moe-convert-")
        self._prepared: tuple[int, LayerStatistics] | None = None
        self._one_thread = contextlib.ExitStack()
        self._calibration = self._calibration_pass(recipe.options, calibration_file)

    def __enter__(self) -> "SourceOrigin":
        # As in a conversion: sums over a tensor depend on torch's number of threads.
        self._one_thread.enter_context(one_torch_thread())
        return self

    def __exit__(self, *_: object) -> None:
        self._one_thread.close()
        self._checkpoint.close()
        self._scratch.cleanup()

    def expert(self, entry: ExpertEntry) -> bytes:
        key = ExpertKey(entry.layer, entry.expert)
        _, blob = self._worker.expert(key, self._statistics(self._units[key]))
        data = blob.numpy().tobytes()
        if entry.codec == "zstd":
            data = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(data)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != entry.sha256:
            name = f"layer {entry.layer} expert {entry.expert}"
            raise self._mismatch(name, sha256, entry.sha256)
        return data

    def file(self, name: str, sha256: str, path: Path) -> None:
        if name == TRUNK_NAME:
            self._trunk(sha256, path)
            return
        if name == "config.json":
            raise MoeConvertError(
                f"{path} is damaged, and the source does not hold the converted config.json",
                "--from OWNER/MODEL, or convert again",
            )
        folder = side_files_of(self._checkpoint).get(name, self._checkpoint.folder)
        data = copied_bytes(folder, name)
        copied_sha256 = hashlib.sha256(data).hexdigest()
        if copied_sha256 != sha256:
            raise self._mismatch(name, copied_sha256, sha256)
        write_file(path, data)

    def _trunk(self, sha256: str, path: Path) -> None:
        with PlacedFile(path, self._plan.trunk_entries, self._plan.trunk_metadata) as trunk:
            self._write_trunk(trunk)
            with open(partial_path(path), "rb") as f:
                written_sha256 = hashlib.file_digest(f, "sha256").hexdigest()
            if written_sha256 == sha256:
                trunk.finish()
                return
        remove(partial_path(path))
        raise self._mismatch(TRUNK_NAME, written_sha256, sha256)

    def _write_trunk(self, trunk: PlacedFile) -> None:
        for key, unit in self._units.items():
            if isinstance(key, LinearKey):
                statistics = self._statistics(unit)
                inputs = statistics.linears[key.module] if statistics else None
                _, tiles = self._worker.linear(key, inputs)
                write_linear(trunk, key, tiles)
            elif isinstance(key, TensorKey):
                write_tensor(trunk, key, self._worker.tensor(key))

    def _calibration_pass(
        self, options: RecipeOptions, file: Path | None
    ) -> CalibrationPass | None:
        calibration = options.calibration
        if calibration is None or self._plan.last_quantized_layer < 0:
            return None
        tokens = calibration_tokens(self._checkpoint, calibration.kind, calibration.tokens, file)
        width = options.down_block(self._checkpoint.architecture.intermediate_size)
        return CalibrationPass(
            self._checkpoint, tokens, Path(self._scratch.name), None, one_by_one, width
        )

    def _statistics(self, unit: Unit) -> LayerStatistics | None:
        """Return the statistics of a unit's decoder layer, or of the head.

        None if the recipe has no calibration, or if the layer is not quantized.
        """
        if self._calibration is None:
            return None
        if unit.layer is None:
            self._prepared = None
            return self._calibration.prepare_head()
        if not self._plan.quantizes(unit.layer):
            return None
        if self._prepared is None or self._prepared[0] != unit.layer:
            # Statistics are large: those of the layer before are freed first.
            self._prepared = None
            self._prepared = unit.layer, self._calibration.prepare(unit.layer)
        return self._prepared[1]

    def _mismatch(self, name: str, sha256: str, expected: str) -> MoeConvertError:
        producer = self._index.producer
        versions = ", ".join(f"{name} {version}" for name, version in producer.versions.items())
        return MoeConvertError(
            f"{name} of {self._checkpoint.name} has sha256 {sha256} when converted now, the index"
            f" says {expected}: it is another checkpoint, or versions or machine differ from those"
            f" of {producer.name} {producer.version} ({versions})",
            "--from OWNER/MODEL, where the folder was published, or convert again",
        )
