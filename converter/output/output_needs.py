"""What a conversion writes and reads: the names of its files, and the inputs that they must not
touch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from converter.checkpoint.source import Checkpoint
from converter.output.conversion_sizes import OutputPlan
from converter.publish.model_card import CARD_NAME
from formats import INDEX_NAME, TRUNK_NAME
from formats.errors import SourceError
from formats.files.io_errors import translated
from formats.layer_file import compression_paths, layer_file_name, partial_path
from formats.quality import QUALITY_NAME

_HEADER_BYTES = 1 << 20
"""Header of the largest file, generously."""


@dataclass(frozen=True)
class OutputNeeds:
    """One conversion's files in its out folder, and what it reads."""

    names: frozenset[str]
    """Of every file of the complete folder, relative to it."""
    largest_file_bytes: int
    source: Path
    """The folder that is only read."""
    inputs: tuple[Path, ...] = ()
    """Further files that are only read."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        plan: OutputPlan,
        copied: Iterable[str],
        inputs: Iterable[Path | None] = (),
    ) -> "OutputNeeds":
        """The needs of converting `checkpoint` by `plan`. copied: names of the files that are
        copied. inputs: further files that are read, None for none.
        """
        layers = (layer_file_name(layer) for layer in range(len(plan.layouts)))
        fixed = (INDEX_NAME, TRUNK_NAME, QUALITY_NAME, CARD_NAME, "config.json")
        folder = checkpoint.folder.resolve()
        # The shards of a Hub cache's snapshot are links into the folder that it lies in.
        source = folder.parent.parent if folder.parent.name == "snapshots" else checkpoint.folder
        with translated(checkpoint.folder, "read", SourceError):
            read = [*checkpoint.folder.iterdir()]
        return cls(
            names=frozenset((*fixed, *layers, *copied)),
            largest_file_bytes=max(plan.trunk_bytes, *plan.layer_bytes) + _HEADER_BYTES,
            source=source,
            inputs=(*read, *(path for path in inputs if path)),
        )

    @property
    def partial_names(self) -> frozenset[str]:
        """The names of its files while they are being written."""
        names = [Path(name) for name in self.names]
        return frozenset(
            str(path) for name in names for path in (partial_path(name), *compression_paths(name))
        )
