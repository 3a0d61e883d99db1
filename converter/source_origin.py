"""The source checkpoint as the origin of repairs: an expert is converted again, and taken if its hash is right."""

import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import zstandard

from converter.calibration import CalibrationPass, down_width
from converter.calibration_text import calibration_tokens
from converter.checkpoint.model_shape import HEAD
from converter.hub_model import HubModel
from converter.side_files import copied_bytes
from converter.sizes import plan_output
from converter.solvers import choose_solver
from converter.source import Checkpoint
from converter.workers import Worker
from formats import TRUNK_NAME
from formats.checksums import Checksums
from formats.errors import MoeConvertError
from formats.index import ExpertEntry, Index
from formats.layer_file import partial_path
from formats.output_file import remove
from formats.repair import Origin
from formats.writer import ZSTD_LEVEL, PlacedFile, write_file


class SourceOrigin(Origin):
    """The checkpoint that the folder of `index` was converted from, by the index's recipe. Use it as a context.

    Experts must be asked for layer by layer, ascending: with calibration, tokens go through the layers before. Raises
    SourceError, RecipeError, HubError. calibration_file: the text, if it was one of the user's.
    """

    def __init__(self, source: Path | HubModel, index: Index, calibration_file: Path | None = None) -> None:
        self._index = index
        self._checkpoint = Checkpoint(source)
        self._solver = choose_solver(index.recipe.solver)
        self._plan = plan_output(self._checkpoint, index.recipe)
        self._worker = Worker(self._checkpoint, self._plan, self._solver, threading.Event())
        self._scratch = tempfile.TemporaryDirectory(prefix="moe-convert-")
        self._prepared = -1
        self._threads = torch.get_num_threads()
        kind, tokens = (index.recipe.options.get(name) for name in ("calibrate", "calibration_tokens"))
        if kind is not None and isinstance(tokens, int) and self._plan.last_quantized_layer >= 0:
            drawn = calibration_tokens(self._checkpoint, str(kind), tokens, calibration_file)
            scratch = Path(self._scratch.name)
            width = down_width(index.recipe, self._checkpoint.architecture)
            self._worker.calibration = CalibrationPass(self._checkpoint, drawn, scratch, None, _in_turn, width)

    def __enter__(self) -> "SourceOrigin":
        # As in a conversion: sums over a tensor depend on torch's threads.
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        self._checkpoint.close()
        self._scratch.cleanup()

    def expert(self, entry: ExpertEntry) -> bytes:
        self._prepare(self._plan.shape.experts[entry.layer].decoder_layer)
        made = _Made()
        self._worker.expert(made, entry.layer, entry.expert)  # type: ignore[arg-type]
        data = made.data
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
                f"{path} is damaged, and not a file of the source", "--from OWNER/MODEL, or convert again"
            )
        data = copied_bytes(self._checkpoint.folder, name)
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise self._other(name, found, sha256)
        write_file(path, data)

    def _trunk(self, sha256: str, path: Path) -> None:
        with PlacedFile(path, self._plan.trunk_entries, self._plan.trunk_metadata) as trunk:
            shape = self._plan.shape
            for layer in range(len(shape.decoder_layers)):
                linears = [m for m in self._plan.packed if shape.decoder_layer(m) == layer]
                if linears:
                    self._prepare(layer)
                for module in linears:
                    self._worker.linear(trunk, module)
            if HEAD in self._plan.packed:
                if self._worker.calibration:
                    self._worker.calibration.prepare_head()
                self._worker.linear(trunk, HEAD)
            for entry in self._plan.trunk_entries:
                if entry.name in self._checkpoint.trunk:
                    self._worker.tensor(trunk, entry.name)
            with open(partial_path(path), "rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            if found == sha256:
                trunk.finish()
                return
        remove(partial_path(path))
        raise self._other(TRUNK_NAME, found, sha256)

    def _prepare(self, layer: int) -> None:
        if self._worker.calibration and self._prepared != layer and self._plan.quantizes(layer):
            self._worker.calibration.prepare(layer)
            self._prepared = layer

    def _other(self, what: str, found: str, expected: str) -> MoeConvertError:
        producer = self._index.producer
        versions = ", ".join(f"{name} {version}" for name, version in producer.versions.items())
        return MoeConvertError(
            f"{what} of {self._checkpoint.name} has sha256 {found} converted now, the index says {expected}: another"
            f" checkpoint, or other versions or another machine than {producer.name} {producer.version} ({versions})",
            "--from OWNER/MODEL, where the folder was published, or convert again",
        )


class _Made:
    """Takes the expert that a worker would write to a layer's file."""

    data = b""

    def write_expert(self, expert: int, blob: torch.Tensor) -> Checksums:
        self.data = blob.numpy().tobytes()
        return Checksums("", "")


def _in_turn(tasks: Iterable[Callable[[], Any]]) -> list[Any]:
    return [task() for task in tasks]
