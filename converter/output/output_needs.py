"""The names of all files that a conversion writes, and the inputs that they must not replace."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.source import Checkpoint
from converter.output.conversion_sizes import OutputPlan
from converter.publish.model_card import CARD_NAME
from formats import INDEX_NAME, TRUNK_NAME
from formats.errors import SourceError
from formats.files.io_errors import translated
from formats.files.partial_file import partial_path
from formats.layer_file import compression_paths, layer_file_name
from formats.quality import QUALITY_NAME

_HEADER_BYTES = 1 << 20
"""Upper estimate of the largest file's header."""


@dataclass(frozen=True)
class OutputNeeds:
    """The files of one conversion.

    names: every file of the complete folder, relative to it. source: the source's folder, which is
    only read. inputs: files that are only read.
    """

    names: frozenset[str]
    largest_file_bytes: int
    source: Path
    inputs: tuple[Path, ...] = ()

    @classmethod
    def for_plan(
        cls,
        checkpoint: Checkpoint,
        plan: OutputPlan,
        copied: Iterable[str],
        inputs: Iterable[Path | None] = (),
    ) -> "OutputNeeds":
        """Return the needs of converting `checkpoint` by `plan`.

        copied: names of the side files to copy. inputs: further files that are read; None is
        skipped.
        """
        layers = (layer_file_name(layer) for layer in range(len(plan.layouts)))
        fixed = (INDEX_NAME, TRUNK_NAME, QUALITY_NAME, CARD_NAME, "config.json")
        folder = checkpoint.folder.resolve()
        # The shards of a snapshot in a Hub cache are links into the repository's folder around it.
        source = folder.parent.parent if folder.parent.name == "snapshots" else checkpoint.folder
        with translated(checkpoint.folder, "read", SourceError):
            source_files = list(checkpoint.folder.iterdir())
            adapter_files = [path for a in checkpoint.adapters for path in a.folder.iterdir()]
        return cls(
            names=frozenset((*fixed, *layers, *copied)),
            largest_file_bytes=max(plan.trunk_bytes, *plan.layer_bytes) + _HEADER_BYTES,
            source=source,
            inputs=(*source_files, *adapter_files, *(path for path in inputs if path)),
        )

    @property
    def partial_names(self) -> frozenset[str]:
        """The names of the files while they are being written."""
        paths: list[Path] = []
        for name in map(Path, self.names):
            paths += (partial_path(name), *compression_paths(name))
        return frozenset(map(str, paths))
