"""The types of an export: names, bits, and which of them hold a packing's weights exactly."""

from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from formats.packing import AnyPacking, Packing

Type: TypeAlias = GGMLQuantizationType

EXACT = "exact"
ROUNDED = "rounded to float16"
ROUNDED_SCALES = "codes exact, scales rounded to float16"
REQUANTIZED = "lossy: requantized"

FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Type.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    Type.Q3_K: LlamaFileType.MOSTLY_Q3_K_M,
    Type.Q2_K: LlamaFileType.MOSTLY_Q2_K,
}
"""Type of most weights -> `general.file_type`, from which llama.cpp prints a name."""

_EXACT_TYPES = {
    "tile32-q2-g16-s4": Type.Q2_K,
    "tile32-q3-g32-s4": Type.Q4_K,
    "rows-bf16": Type.BF16,
    "rows-f16": Type.F16,
}


def type_named(choice: str) -> Type:
    """Return the type of an option's value, such as "q4_k"."""
    return GGMLQuantizationType[choice.upper()]


def exact_type(packing: AnyPacking) -> Type | None:
    """Return the smallest type, except F32, that holds the packing's weights exactly."""
    return _EXACT_TYPES.get(packing.name)


def loss(packing: AnyPacking, kind: Type) -> str:
    """Describe the change of weights of `packing` as `kind`: one of the words above."""
    if kind in (Type.F32, exact_type(packing)):
        return EXACT
    if kind in (Type.F16, Type.BF16):
        return ROUNDED
    keeps_codes = isinstance(packing, Packing) and packing.group_size % 32 == 0
    return ROUNDED_SCALES if kind == Type.Q4_1 and keeps_codes else REQUANTIZED


def bits_per_weight(kind: Type) -> float:
    """Return the stored bits of one weight."""
    columns, n_bytes = GGML_QUANT_SIZES[kind]
    return 8 * n_bytes / columns


def block_columns(kind: Type) -> int:
    """Return the number of columns of one block; 1 for a float type."""
    return GGML_QUANT_SIZES[kind][0]


def row_bytes(kind: Type, columns: int) -> int:
    """Return the size of a row in bytes; `columns` is a multiple of `block_columns`."""
    block, n_bytes = GGML_QUANT_SIZES[kind]
    return columns // block * n_bytes
