"""The tensors of an export: names, shapes and types, fixed before the first weight is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from gguf import MODEL_ARCH, MODEL_TENSOR, TENSOR_NAMES, get_tensor_name_map

from converter.gguf.block_types import (
    EXACT,
    Type,
    bits_per_weight,
    block_columns,
    exact_type,
    loss,
    row_bytes,
    type_named,
)
from converter.gguf.choices import EXPERT_CHOICES
from converter.gguf.options import ExportOptions
from formats.artifact import Artifact
from formats.errors import FormatError, RecipeError
from formats.packing import PACKINGS, AnyPacking, packing_named
from formats.safetensors_header import TensorEntry
from formats.trunk import without_fillers

MATRICES = ("gate", "up", "down")
"""Matrices of an expert, in the order of `formats.expert.split`."""
_STACKED = (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP)
_FLOATS = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF file."""

    name: str
    part: str
    """Part of the model, such as "experts gate, up"."""
    shape: tuple[int, ...]
    """Sizes with the columns last; GGUF stores them in reverse order."""
    kind: Type
    stored: tuple[str, ...]
    """Names of the packings or dtypes in the folder: one, or one for each expert."""
    losses: tuple[str, ...]
    """Words of `block_types`, one for each of `stored`."""

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


@dataclass(frozen=True)
class TrunkTensor(Tensor):
    """A tensor of the trunk. entry: its place; packing: None for a float tensor."""

    entry: TensorEntry
    packing: AnyPacking | None
    heads: int = 0
    """Number of heads whose rows are permuted; 0 for none."""


@dataclass(frozen=True)
class StackedTensor(Tensor):
    """One matrix of all experts of a layer. matrix: its number in MATRICES."""

    layer: int
    matrix: int

    @property
    def expert_bytes(self) -> int:
        """Size of one expert's matrix."""
        return self.n_bytes // self.shape[0]


def plan_tensors(artifact: Artifact, options: ExportOptions) -> list[Tensor]:
    """Return all tensors in the order of the file.

    Raises RecipeError for a type that does not fit the columns, and for experts without an exact
    type if the user names none.
    """
    trunk = list(_trunk_tensors(artifact, options))
    layers = range(artifact.architecture.expert_layers)
    stacked = [_stacked(artifact, layer, m, options) for layer in layers for m in range(3)]
    outer = [tensor for tensor in trunk if not tensor.name.startswith("blk.")]
    blocks = [tensor for tensor in trunk if tensor.name.startswith("blk.")]
    return [*outer, *sorted([*blocks, *stacked], key=_block_number)]


def _block_number(tensor: Tensor) -> int:
    return int(tensor.name.split(".")[1])


def _trunk_tensors(artifact: Artifact, options: ExportOptions) -> Iterator[TrunkTensor]:
    a = artifact.architecture
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, a.num_hidden_layers)
    packed = artifact.index.trunk.packed
    for entry in without_fillers(artifact.trunk_header().entries.values()):
        module, _, part = entry.name.rpartition(".")
        name = names.get_name(module)
        if name is None or part not in ("weight", "packed"):
            raise FormatError(f"{artifact.folder}: llama.cpp has no tensor for {entry.name}")
        heads = {"q_proj": a.num_attention_heads, "k_proj": a.num_key_value_heads}
        matrix = packed.get(module)
        packing = packing_named(matrix.packing) if matrix else None
        shape = (matrix.rows, matrix.columns) if matrix else entry.shape
        group, kind = _trunk_type(entry.name, len(shape), _FLOATS.get(entry.dtype), options)
        tensor = TrunkTensor(
            name=f"{name}.weight",
            part=group,
            shape=shape,
            kind=kind,
            stored=(packing.name if packing else entry.dtype,),
            losses=(_trunk_loss(packing, entry.dtype, kind),),
            entry=entry,
            packing=packing,
            heads=heads.get(module.rpartition(".")[2], 0),
        )
        _check_columns(tensor, "--attention f16")
        yield tensor


def _trunk_type(
    name: str, dims: int, stored: Type | None, options: ExportOptions
) -> tuple[str, Type]:
    """Return part and type of a tensor of the trunk. stored: its float type; None if packed."""
    if dims == 1:
        return "norms", Type.F32
    if "embed_tokens" in name:
        return "embeddings", _first(stored, options.attention)
    if "self_attn" in name:
        return "attention", _first(options.attention, stored)
    if "lm_head" in name:
        return "head", _first(stored, options.attention)
    # llama.cpp expects the router in float32.
    return "router", Type.F32


def _first(*kinds: Type | None) -> Type:
    """Return the first type that is given, or F16. `or` would not do: F32 is 0."""
    return next((kind for kind in kinds if kind is not None), Type.F16)


def _trunk_loss(packing: AnyPacking | None, dtype: str, kind: Type) -> str:
    if packing is None:
        if _FLOATS[dtype] == kind:
            return EXACT
        # No choice is BF16, so float32 is rounded or requantized as bfloat16 is.
        packing = packing_named("rows-f16" if dtype == "F16" else "rows-bf16")
    return loss(packing, kind)


def _stacked(artifact: Artifact, layer: int, matrix: int, options: ExportOptions) -> StackedTensor:
    a = artifact.architecture
    is_down = matrix == 2
    packings = [
        artifact.layout(layer, expert).down if is_down else artifact.layout(layer, expert).gate_up
        for expert in range(a.num_local_experts)
    ]
    shape = (a.intermediate_size, a.hidden_size)
    what = f"layer {layer}: {MATRICES[matrix]} of the experts"
    kind = _expert_type(packings, options.experts, what)
    # The number of the decoder layer is that of the module path.
    block = int(artifact.architecture.expert_modules[layer].split(".")[2])
    tensor = StackedTensor(
        name=TENSOR_NAMES[_STACKED[matrix]].format(bid=block) + ".weight",
        part="experts down" if is_down else "experts gate, up",
        shape=(a.num_local_experts, *(reversed(shape) if is_down else shape)),
        kind=kind,
        stored=tuple(packing.name for packing in packings),
        losses=tuple(loss(packing, kind) for packing in packings),
        layer=layer,
        matrix=matrix,
    )
    _check_columns(tensor, "--experts f16")
    return tensor


def _expert_type(packings: Sequence[AnyPacking], chosen: Type | None, what: str) -> Type:
    """Return the type of a stacked tensor.

    A float type replaces every type. Another chosen type replaces larger ones, and stands in where
    the experts have no common exact type.
    """
    exact = {exact_type(packing) for packing in packings}
    common = exact.pop() if len(exact) == 1 else None
    if chosen is None:
        if common is None:
            raise _no_exact_type(packings, what)
        return common
    if common is None or chosen in (Type.F32, Type.F16):
        return chosen
    return common if bits_per_weight(common) <= bits_per_weight(chosen) else chosen


def _no_exact_type(packings: Sequence[AnyPacking], what: str) -> RecipeError:
    names = sorted({packing.name for packing in packings})
    choices = []
    for choice in EXPERT_CHOICES:
        words = {loss(packing, type_named(choice)) for packing in packings}
        choices.append(
            f"{choice} ({bits_per_weight(type_named(choice)):g} bits, {' or '.join(sorted(words))})"
        )
    together = " together" if len(names) > 1 else ""
    has_tiles = any(name in PACKINGS for name in names)
    best = "q4_1" if has_tiles and all(PACKINGS[n].group_size >= 32 for n in names) else "q8_0"
    return RecipeError(
        f"{what}: no GGUF type holds {' and '.join(names)}{together} exactly;"
        f" choose one of {', '.join(choices)}",
        f"add --experts {best}",
    )


def _check_columns(tensor: Tensor, hint: str) -> None:
    block = block_columns(tensor.kind)
    columns = tensor.shape[-1]
    if columns % block:
        raise RecipeError(
            f"{tensor.name}: {columns} columns; {tensor.kind.name} needs a multiple of {block}",
            f"add {hint}: float types take any number of columns",
        )
