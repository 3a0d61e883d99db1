"""The file of one layer's experts: where each expert lies, and the header that says so."""

from pathlib import Path

from formats import ALIGNMENT_BYTES, EXPERTS_FOLDER, FORMAT_VERSION
from formats.expert import ACTIVATION, ExpertLayout
from formats.safetensors_header import TensorEntry

FILLER_PREFIX = "__pad__."
"""What the names of fillers begin with: the zero bytes between an expert and the next multiple of
4096.
"""


def layer_file_name(layer: int) -> str:
    """The name of a layer's file inside the converted folder."""
    return f"{EXPERTS_FOLDER}/layer-{layer:03d}.safetensors"


def expert_prefix(module: str, expert: int) -> str:
    """What the names of an expert's tensors begin with. module: the path of the layer's experts in
    the model.
    """
    return f"{module}.{expert}"


def aligned(position: int) -> int:
    """`position` rounded up to the next multiple of 4096."""
    return position + -position % ALIGNMENT_BYTES


def raw_entries(module: str, layouts: list[ExpertLayout]) -> list[TensorEntry]:
    """The tensors of a layer's file, experts in ascending order, each from a multiple of 4096, with
    fillers.
    """
    entries: list[TensorEntry] = []
    for expert, layout in enumerate(layouts):
        prefix = expert_prefix(module, expert)
        begin = entries[-1].end if entries else 0
        middle, end = begin + layout.gate_up_bytes, begin + layout.n_bytes
        entries.append(
            TensorEntry(
                f"{prefix}.gate_up", layout.gate_up.dtype, layout.gate_up_shape, begin, middle
            )
        )
        entries.append(
            TensorEntry(f"{prefix}.down", layout.down.dtype, layout.down_shape, middle, end)
        )
        entries.extend(_filler(expert, end))
    return entries


def zstd_entries(module: str, lengths: list[int]) -> list[TensorEntry]:
    """The tensors of a compressed layer's file: one frame of `lengths[expert]` bytes an expert."""
    entries: list[TensorEntry] = []
    for expert, length in enumerate(lengths):
        begin = entries[-1].end if entries else 0
        entries.append(
            TensorEntry(
                f"{expert_prefix(module, expert)}.zstd", "U8", (length,), begin, begin + length
            )
        )
        entries.extend(_filler(expert, begin + length))
    return entries


def layer_metadata(
    layer: int, module: str, layouts: list[ExpertLayout], codec: str
) -> dict[str, str]:
    """The header's metadata: what is needed, with the tensors, to write the index again."""
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


def partial_path(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(path.name + ".partial")


def compression_paths(path: Path) -> tuple[Path, Path]:
    """Where a layer's compressed file is written until it is complete, and the frames before it."""
    return path.with_name(path.name + ".zstd.partial"), path.with_name(
        path.name + ".frames.partial"
    )


def _filler(expert: int, position: int) -> list[TensorEntry]:
    end = aligned(position)
    return (
        [TensorEntry(f"{FILLER_PREFIX}{expert}", "U8", (end - position,), position, end)]
        if end > position
        else []
    )
