"""The index of a complete conversion, assembled from its plan and its journal."""

import hashlib
from importlib.metadata import version

from converter import __version__
from converter.conversion.identity import calibration_version, overlay_version
from converter.conversion.plan import ConversionPlan
from converter.journal.records import LayerRecord
from converter.output.conversion_sizes import OutputPlan
from formats import FORMAT_VERSION, TRUNK_NAME
from formats.expert import ExpertLayout
from formats.index import (
    CopiedFile,
    ExpertEntry,
    Index,
    LayerFile,
    Producer,
    Shard,
    Source,
    Trunk,
)
from formats.layer_file import layer_file_name
from formats.trunk import parameter_count
from formats.writer import PlacedFile


def assemble_index(
    plan: ConversionPlan,
    shard_sha256: dict[str, str],
    trunk: PlacedFile,
    layers: list[LayerRecord],
    files: list[CopiedFile],
) -> Index:
    """Return the index of the folder that `plan` describes.

    shard_sha256: sha256 of each of the source's shards, in hex. trunk: the finished trunk file.
    layers: the journal's records of the layer files, in order. files: the copied side files.
    """
    checkpoint = plan.checkpoint
    return Index(
        format="moe-convert",
        format_version=FORMAT_VERSION,
        producer=Producer("moe-convert", __version__, _versions(plan)),
        source=Source(
            checkpoint.name,
            checkpoint.revision,
            [Shard(name, size, shard_sha256[name]) for name, size in checkpoint.shards.items()],
            [adapter.recorded for adapter in checkpoint.adapters],
        ),
        config=checkpoint.config,
        architecture=checkpoint.architecture,
        recipe=plan.recipe.recorded,
        packings=plan.output.packings,
        trunk=trunk_part(plan.output, trunk),
        layers=[
            layer_part(record, layouts, plan.options.codec)
            for record, layouts in zip(layers, plan.output.layouts, strict=True)
        ],
        files=files,
    )


def _versions(plan: ConversionPlan) -> dict[str, str]:
    """Return the versions that decide the folder's bytes, beside shards and recipe."""
    versions = {"solver": plan.solver.version}
    if plan.tokens:
        versions["calibration"] = calibration_version(plan.tokens)
    if overlay := overlay_version(plan.checkpoint):
        versions["overlay"] = overlay
    if plan.checkpoint.adapters:
        versions["peft"] = version("peft")
    return versions


def trunk_part(output: OutputPlan, trunk: PlacedFile) -> Trunk:
    """Return the index's part for the finished trunk file."""
    entries = output.trunk_entries
    packed = output.packed
    with open(trunk.path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return Trunk(
        file=TRUNK_NAME,
        size_bytes=trunk.size_bytes,
        header_sha256=hashlib.sha256(trunk.header).hexdigest(),
        sha256=sha256,
        tensors=len(entries),
        parameters=parameter_count(entries, packed),
        packed=packed,
    )


def layer_part(record: LayerRecord, layouts: list[ExpertLayout], codec: str) -> LayerFile:
    """Return the index's part for a complete layer file. layouts: of its experts."""
    layer = record.layer
    entries = [
        ExpertEntry(layer, expert, *place, layout.gate_up.name, layout.down.name, codec)
        for expert, (place, layout) in enumerate(zip(record.places, layouts, strict=True))
    ]
    return LayerFile(layer_file_name(layer), record.size_bytes, record.header_sha256, entries)
