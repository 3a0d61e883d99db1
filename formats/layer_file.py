"""The file of one layer's experts: tensor entries and metadata of its header."""

from pathlib import Path

from formats import ALIGNMENT_BYTES, EXPERTS_FOLDER, FORMAT_VERSION
from formats.expert import ACTIVATION, ExpertLayout
from formats.safetensors_header import TensorEntry

FILLER_PREFIX = "__pad__."
"""First part of the name of a filler: zero bytes up to the next multiple of 4096."""


def layer_file_name(layer: int) -> str:
    """Return the name of a layer's file, relative to the converted folder."""
    return f"{EXPERTS_FOLDER}/layer-{layer:03d}.safetensors"


def expert_prefix(module: str, expert: int) -> str:
    """Return the first part of the names of an expert's tensors.

    `module` is the path of the layer's experts in the model.
    """
    return f"{module}.{expert}"


def aligned(position: int) -> int:
    """Round `position` up to a multiple of 4096."""
    return position + -position % ALIGNMENT_BYTES


def raw_entries(module: str, layouts: list[ExpertLayout]) -> list[TensorEntry]:
    """List the tensors of an uncompressed layer file, with fillers, in file order.

    Each expert begins at a multiple of 4096.
    """
    entries: list[TensorEntry] = []
    for expert, layout in enumerate(layouts):
        prefix = expert_prefix(module, expert)
        begin = entries[-1].end if entries else 0
        middle = begin + layout.gate_up_bytes
        end = begin + layout.n_bytes
        entries += [
            TensorEntry(
                f"{prefix}.gate_up", layout.gate_up.dtype, layout.gate_up_shape, begin, middle
            ),
            TensorEntry(f"{prefix}.down", layout.down.dtype, layout.down_shape, middle, end),
            *_filler(expert, end),
        ]
    return entries


def zstd_entries(module: str, lengths: list[int]) -> list[TensorEntry]:
    """List the tensors of a compressed layer file, with fillers, in file order.

    `lengths[expert]` is the size of the expert's frame in bytes.
    """
    entries: list[TensorEntry] = []
    for expert, length in enumerate(lengths):
        begin = entries[-1].end if entries else 0
        end = begin + length
        entries += [
            TensorEntry(f"{expert_prefix(module, expert)}.zstd", "U8", (length,), begin, end),
            *_filler(expert, end),
        ]
    return entries


def layer_metadata(
    layer: int, module: str, layouts: list[ExpertLayout], codec: str
) -> dict[str, str]:
    """Return the header's metadata.

    Metadata and tensor entries suffice to rebuild the layer's part of the index.
    """
    return {
        "format": "moe-convert",
        "format_version": str(FORMAT_VERSION),
        "layer": str(layer),
        "module": module,
        "hidden_size": str(layouts[0].hidden),
        "intermediate_size": str(layouts[0].intermediate),
        "activation": ACTIVATION,
        "gate_up": ",".join(layout.gate_up.name for layout in layouts),
        "down": ",".join(layout.down.name for layout in layouts),
        "codec": codec,
    }


def compression_paths(path: Path) -> tuple[Path, Path]:
    """Return the paths of the compressed layer file, until complete, and of its zstd frames."""
    compressed = path.with_name(path.name + ".zstd.partial")
    frames = path.with_name(path.name + ".frames.partial")
    return compressed, frames


def _filler(expert: int, position: int) -> list[TensorEntry]:
    end = aligned(position)
    if end == position:
        return []
    return [TensorEntry(f"{FILLER_PREFIX}{expert}", "U8", (end - position,), position, end)]
