"""What trunk.safetensors holds: packed matrices as the index names them, and numbers. What of it a
model needs, its class says when it is loaded.
"""

from collections.abc import Iterable
from math import prod

from msgspec.json import encode

from formats import FORMAT_VERSION
from formats.errors import FormatError
from formats.index import Architecture, PackedLinear, Trunk
from formats.layer_file import FILLER_PREFIX
from formats.packing import tile_packing_named
from formats.safetensors_header import TensorEntry

FLOAT_DTYPES = ("F32", "F16", "BF16")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""transformers' names of an attention's matrices."""
PACKED = ".packed"
"""How the name of a packed matrix's tensor ends, after its module's path."""


def trunk_metadata(architecture: Architecture, packed: dict[str, PackedLinear]) -> dict[str, str]:
    """The header's metadata: what is needed, with config.json and the tensors, to write the index
    again.
    """
    return {
        "format": "moe-convert",
        "format_version": str(FORMAT_VERSION),
        "model_type": architecture.model_type,
        "expert_modules": encode(architecture.expert_modules).decode(),
        "packed": encode(packed).decode(),
    }


def without_fillers(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """The tensors that are something's weights."""
    return [entry for entry in entries if not entry.name.startswith(FILLER_PREFIX)]


def parameter_count(entries: Iterable[TensorEntry], packed: dict[str, PackedLinear]) -> int:
    """How many numbers the model has in the trunk: of a packed matrix its weights."""
    count = sum(linear.rows * linear.columns for linear in packed.values())
    return count + sum(
        prod(entry.shape)
        for entry in without_fillers(entries)
        if entry.name.removesuffix(PACKED) not in packed
    )


def attention_size(
    entries: Iterable[TensorEntry], packed: dict[str, PackedLinear]
) -> tuple[int, int]:
    """(stored bytes, weights) of the attention's matrices."""
    n_bytes = n_weights = 0
    for entry in entries:
        module, _, part = entry.name.rpartition(".")
        if module.rpartition(".")[2] in ATTENTION and part in ("weight", "packed"):
            n_bytes += entry.n_bytes
            n_weights += (
                packed[module].rows * packed[module].columns
                if module in packed
                else prod(entry.shape)
            )
    return n_bytes, n_weights


def check_trunk(entries: dict[str, TensorEntry], trunk: Trunk, where: str) -> None:
    """FormatError naming the first tensor that is not what the index says, or that is neither
    packed nor numbers.
    """
    present = {entry.name: entry for entry in without_fillers(entries.values())}
    for module, linear in trunk.packed.items():
        packing = tile_packing_named(linear.packing, f"{where}: {module}")
        entry = present.pop(f"{module}{PACKED}", None)
        shape = packing.stored_shape(linear.rows, linear.columns)
        if entry is None:
            raise FormatError(f"{where}: tensor {module}{PACKED} is missing")
        _check(entry, shape, (packing.dtype,), where)
        if f"{module}.weight" in present:
            raise FormatError(f"{where}: {module} is there packed and as {module}.weight")
    for entry in present.values():
        _check(entry, entry.shape, FLOAT_DTYPES, where)


def _check(entry: TensorEntry, shape: tuple[int, ...], dtypes: tuple[str, ...], where: str) -> None:
    if entry.shape != shape:
        raise FormatError(
            f"{where}: tensor {entry.name} has shape {list(entry.shape)}, expected {list(shape)}"
        )
    if entry.dtype not in dtypes:
        raise FormatError(
            f"{where}: tensor {entry.name} is {entry.dtype}, expected {' or '.join(dtypes)}"
        )
