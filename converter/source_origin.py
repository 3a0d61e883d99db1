"""The source checkpoint as the origin of repairs: an expert is converted again, and taken if its
hash is right.
"""

import hashlib
import tempfile
import threading
from pathlib import Path

import torch
import zstandard

from converter.calibration.calibration_pass import CalibrationPass
from converter.calibration.calibration_text import calibration_tokens
from converter.calibration.layer_statistics import LayerStatistics
from converter.checkpoint.shards.hub_model import HubModel
from converter.checkpoint.source import Checkpoint
from converter.conversion.units import Unit, units_of
from converter.conversion.worker import Worker
from converter.forward.ordered_tasks import one_by_one
from converter.journal.keys import ExpertKey, LinearKey, TensorKey
from converter.output.conversion_sizes import plan_output
from converter.output.output_files import write_linear, write_tensor
from converter.output.source_side_files import copied_bytes
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_options import RecipeOptions
from converter.solvers.registry import choose_solver
from formats import TRUNK_NAME
from formats.errors import MoeConvertError
from formats.files.output_file import remove
from formats.index import ExpertEntry, Index
from formats.layer_file import partial_path
from formats.repair.repairs import Origin
from formats.writer import ZSTD_LEVEL, PlacedFile, write_file


class SourceOrigin(Origin):
    """The checkpoint that the folder of `index` was converted from, by the index's recipe. Use it
    as a context.

    Experts must be asked for layer by layer, ascending: with calibration, tokens go through the
    layers before. Raises SourceError, RecipeError, HubError. calibration_file: the text, if it was
    one of the user's.
    """

    def __init__(
        self, source: Path | HubModel, index: Index, calibration_file: Path | None = None
    ) -> None:
        self._index = index
        self._checkpoint = Checkpoint(source)
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
        self._threads = torch.get_num_threads()
        self._calibration = self._calibration_pass(recipe.options, calibration_file)

    def __enter__(self) -> "SourceOrigin":
        # As in a conversion: sums over a tensor depend on torch's threads.
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        self._checkpoint.close()
        self._scratch.cleanup()

    def expert(self, entry: ExpertEntry) -> bytes:
        key = ExpertKey(entry.layer, entry.expert)
        _, blob = self._worker.expert(key, self._statistics_of(self._units[key]))
        data = blob.numpy().tobytes()
        if entry.codec == "zstd":
            data = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(data)
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise self._other(f"layer {entry.layer} expert {entry.expert}", found, entry.sha256)
        return data

    def file(self, name: str, sha256: str, path: Path) -> None:
        if name == TRUNK_NAME:
            self._trunk(sha256, path)
            return
        if name == "config.json":
            raise MoeConvertError(
                f"{path} is damaged, and not a file of the source",
                "--from OWNER/MODEL, or convert again",
            )
        data = copied_bytes(self._checkpoint.folder, name)
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise self._other(name, found, sha256)
        write_file(path, data)

    def _trunk(self, sha256: str, path: Path) -> None:
        with PlacedFile(path, self._plan.trunk_entries, self._plan.trunk_metadata) as trunk:
            for key, unit in self._units.items():
                if isinstance(key, LinearKey):
                    statistics = self._statistics_of(unit)
                    _, tiles = self._worker.linear(
                        key, statistics.linears[key.module] if statistics else None
                    )
                    write_linear(trunk, key, tiles)
                elif isinstance(key, TensorKey):
                    write_tensor(trunk, key, self._worker.tensor(key))
            with open(partial_path(path), "rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            if found == sha256:
                trunk.finish()
                return
        remove(partial_path(path))
        raise self._other(TRUNK_NAME, found, sha256)

    def _calibration_pass(
        self, options: RecipeOptions, file: Path | None
    ) -> CalibrationPass | None:
        calibration = options.calibration
        if calibration is None or self._plan.last_quantized_layer < 0:
            return None
        drawn = calibration_tokens(self._checkpoint, calibration.kind, calibration.tokens, file)
        width = options.down_block(self._checkpoint.architecture.intermediate_size)
        return CalibrationPass(
            self._checkpoint, drawn, Path(self._scratch.name), None, one_by_one, width
        )

    def _statistics_of(self, unit: Unit) -> LayerStatistics | None:
        """The statistics of the decoder layer of a unit, or of the head; None where nothing is
        calibrated.
        """
        if self._calibration is None:
            return None
        if unit.layer is None:
            self._prepared = None
            return self._calibration.prepare_head()
        if not self._plan.quantizes(unit.layer):
            return None
        if self._prepared is None or self._prepared[0] != unit.layer:
            # Before the next layer's: they are large.
            self._prepared = None
            self._prepared = unit.layer, self._calibration.prepare(unit.layer)
        return self._prepared[1]

    def _other(self, what: str, found: str, expected: str) -> MoeConvertError:
        producer = self._index.producer
        versions = ", ".join(f"{name} {version}" for name, version in producer.versions.items())
        return MoeConvertError(
            f"{what} of {self._checkpoint.name} has sha256 {found} converted now, the index says {expected}: another"
            f" checkpoint, or other versions or another machine than {producer.name} {producer.version} ({versions})",
            "--from OWNER/MODEL, where the folder was published, or convert again",
        )
