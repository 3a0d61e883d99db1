"""The index of a complete conversion, from its plan and its journal."""

import hashlib

from converter import __version__
from converter.calibration.calibration_text import CalibrationTokens
from converter.checkpoint.source import Checkpoint
from converter.conversion.identity import calibration_version, overlay_version
from converter.journal.records import LayerRecord
from converter.output.conversion_sizes import OutputPlan
from converter.solvers.interface import Solver
from formats import FORMAT_VERSION, TRUNK_NAME
from formats.expert import ExpertLayout
from formats.index import (
    CopiedFile,
    ExpertEntry,
    Index,
    LayerFile,
    Producer,
    Recipe,
    Shard,
    Source,
    Trunk,
)
from formats.layer_file import layer_file_name
from formats.trunk import parameter_count
from formats.writer import PlacedFile


def assemble_index(
    checkpoint: Checkpoint,
    shard_sha256: dict[str, str],
    recipe: Recipe,
    plan: OutputPlan,
    codec: str,
    solver: Solver,
    tokens: CalibrationTokens | None,
    trunk: PlacedFile,
    layers: list[LayerRecord],
    files: list[CopiedFile],
) -> Index:
    """`trunk` is finished; `layers` are the journal's records of the layer files, in order; `files`
    the copied ones.
    """
    layouts = plan.layouts
    versions = {"solver": solver.version}
    if tokens:
        versions["calibration"] = calibration_version(tokens)
    if overlay := overlay_version(checkpoint):
        versions["overlay"] = overlay
    with open(trunk.path, "rb") as f:
        trunk_sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    shards = [Shard(name, size, shard_sha256[name]) for name, size in checkpoint.shards.items()]
    return Index(
        format="moe-convert",
        format_version=FORMAT_VERSION,
        producer=Producer("moe-convert", __version__, versions),
        source=Source(checkpoint.name, checkpoint.revision, shards),
        config=checkpoint.config,
        architecture=checkpoint.architecture,
        recipe=recipe,
        packings=plan.packings,
        trunk=Trunk(
            file=TRUNK_NAME,
            size_bytes=trunk.size_bytes,
            header_sha256=hashlib.sha256(trunk.header).hexdigest(),
            sha256=trunk_sha256,
            tensors=len(plan.trunk_entries),
            parameters=parameter_count(plan.trunk_entries, plan.packed),
            packed=plan.packed,
        ),
        layers=[
            _layer_file(layer, record, layouts[layer], codec) for layer, record in enumerate(layers)
        ],
        files=files,
    )


def _layer_file(
    layer: int, record: LayerRecord, layouts: list[ExpertLayout], codec: str
) -> LayerFile:
    entries = [
        ExpertEntry(layer, e, *place, layouts[e].gate_up.name, layouts[e].down.name, codec)
        for e, place in enumerate(record.places)
    ]
    return LayerFile(layer_file_name(layer), record.size_bytes, record.header_sha256, entries)
