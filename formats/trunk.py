"""The trunk: packed matrices listed in the index, and plain float tensors.

The loader compares its tensor names and shapes with the model class.
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

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Names of the attention's matrices in transformers."""

_FLOAT_DTYPES = ("F32", "F16", "BF16")
_PACKED_SUFFIX = ".packed"
"""Last part of the name of a packed matrix's tensor, after its module's path."""


def trunk_metadata(architecture: Architecture, packed: dict[str, PackedLinear]) -> dict[str, str]:
    """Return the header's metadata.

    With config.json and the tensor entries, it suffices to rebuild `architecture` and `trunk` of
    the index.
    """
    return {
        "format": "moe-convert",
        "format_version": str(FORMAT_VERSION),
        "model_type": architecture.model_type,
        "expert_modules": encode(architecture.expert_modules).decode(),
        "packed": encode(packed).decode(),
    }


def without_fillers(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Return the tensors that hold weights."""
    return [entry for entry in entries if not entry.name.startswith(FILLER_PREFIX)]


def parameter_count(entries: Iterable[TensorEntry], packed: dict[str, PackedLinear]) -> int:
    """Count the model's parameters in the trunk. A packed matrix counts rows · columns."""
    count = sum(linear.rows * linear.columns for linear in packed.values())
    return count + sum(
        prod(entry.shape)
        for entry in without_fillers(entries)
        if entry.name.removesuffix(_PACKED_SUFFIX) not in packed
    )


def attention_size(
    entries: Iterable[TensorEntry], packed: dict[str, PackedLinear]
) -> tuple[int, int]:
    """Return (stored bytes, number of weights) of all attention matrices."""
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
    """Compare the tensors with the index.

    Raises FormatError, with `where` in its message, for the first packed matrix that is missing or
    has another shape or dtype, and for any other tensor that is not float.
    """
    present = {entry.name: entry for entry in without_fillers(entries.values())}
    for module, linear in trunk.packed.items():
        packing = tile_packing_named(linear.packing, f"{where}: {module}")
        entry = present.pop(f"{module}{_PACKED_SUFFIX}", None)
        shape = packing.stored_shape(linear.rows, linear.columns)
        if entry is None:
            raise FormatError(f"{where}: tensor {module}{_PACKED_SUFFIX} is missing")
        _check(entry, shape, (packing.dtype,), where)
        if f"{module}.weight" in present:
            raise FormatError(f"{where}: {module} is stored twice: packed and as {module}.weight")
    for entry in present.values():
        _check(entry, entry.shape, _FLOAT_DTYPES, where)


def _check(entry: TensorEntry, shape: tuple[int, ...], dtypes: tuple[str, ...], where: str) -> None:
    if entry.shape != shape:
        raise FormatError(
            f"{where}: tensor {entry.name} has shape {list(entry.shape)}, expected {list(shape)}"
        )
    if entry.dtype not in dtypes:
        raise FormatError(
            f"{where}: tensor {entry.name} is {entry.dtype}, expected {' or '.join(dtypes)}"
        )
