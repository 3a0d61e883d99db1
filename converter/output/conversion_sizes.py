"""Layouts, sizes, memory and disk of a conversion, before its first weight is read."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

from converter.calibration.pass_memory import calibration_memory_bytes
from converter.checkpoint.adapters.changes import MERGED_AT_ONCE
from converter.checkpoint.model_shape import HEAD, ModelShape
from converter.checkpoint.weight import Weight
from converter.recipe.bit_budget import likely_bits
from converter.recipe.bit_rules import UNPACKED
from converter.recipe.conversion_recipe import ConversionRecipe, packings_by_expert
from converter.solvers.interface import Solver
from converter.solvers.plain_rows import plain_packing_for
from formats import INDEX_NAME, TRUNK_NAME
from formats.errors import DoesNotFitError, RecipeError
from formats.expert import ExpertLayout
from formats.files.disk_space import free_disk_bytes
from formats.files.io_errors import translated
from formats.files.partial_file import partial_path
from formats.index import PackedLinear
from formats.layer_file import layer_file_name, raw_entries
from formats.packing import PACKINGS, tile_packing_named
from formats.safetensors_header import DTYPE_BYTES, TensorEntry
from formats.trunk import trunk_metadata

CHUNK_WEIGHTS = 4 << 20
"""Weights that a worker solves at once. The number decides when the hqq package stops iterating,
and so the bytes of a result.
"""

_BASE_MEMORY_BYTES = 300 << 20
"""Measured after the process's imports, rounded up."""

_PEFT_BYTES = 100 << 20
"""PEFT's import and its layers."""

_SMALL_FILES_BYTES = 16 << 20
"""Upper estimate of tokenizer, index, quality.json and the like."""


class Sized(Protocol):
    """A `Checkpoint` or an `Outline`: all that the sizes of a conversion depend on."""

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""

    @property
    def trunk(self) -> dict[str, Weight]:
        """Name -> tensor of the trunk."""

    @property
    def expert_dtypes(self) -> set[str]:
        """The dtypes of the stored experts, by safetensors' names."""

    @property
    def adapter_bytes(self) -> int:
        """Memory of the adapters' tensors."""


@dataclass(frozen=True)
class OutputPlan:
    """The sizes of all that a conversion of one checkpoint by one recipe writes.

    layouts: layouts[layer][expert], of the layers with experts. packed: module -> matrix of the
    trunk that is packed. layer_bytes: of each layer's file. calibration_bytes: memory of the
    calibration, and more for each worker. adapter_bytes: memory of merged adapters, 0 without any.
    """

    layouts: list[list[ExpertLayout]]
    shape: ModelShape
    trunk_entries: list[TensorEntry]
    packed: dict[str, PackedLinear]
    expert_weights: int
    attention_weights: int
    attention_bytes: int
    trunk_bytes: int
    layer_bytes: list[int]
    calibration_bytes: tuple[int, int]
    adapter_bytes: int

    @property
    def packings(self) -> list[str]:
        """The names of all packings in use, ascending."""
        layouts = [layout for layer in self.layouts for layout in layer]
        names = {layout.gate_up.name for layout in layouts}
        names |= {layout.down.name for layout in layouts}
        names |= {linear.packing for linear in self.packed.values()}
        return sorted(names)

    @property
    def trunk_metadata(self) -> dict[str, str]:
        """The metadata of the trunk's header."""
        return trunk_metadata(self.shape.architecture, self.packed)

    @property
    def last_quantized_layer(self) -> int:
        """The last decoder layer with a quantized matrix; -1 if there is none.

        A quantized head counts as one more layer.
        """
        count = len(self.shape.decoder_layers)
        if HEAD in self.packed:
            return count
        return max(filter(self.quantizes, range(count)), default=-1)

    def quantizes(self, layer: int) -> bool:
        """True if a matrix of decoder layer `layer` is quantized."""
        for module, layouts in zip(self.shape.experts, self.layouts, strict=True):
            if module.decoder_layer == layer and any(map(_is_quantized, layouts)):
                return True
        return any(self.shape.decoder_layer(module) == layer for module in self.packed)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts, without fillers and headers."""
        return sum(layout.n_bytes for layer in self.layouts for layout in layer)

    @property
    def largest_expert_bytes(self) -> int:
        return max(layout.n_bytes for layer in self.layouts for layout in layer)

    @property
    def total_bytes(self) -> int:
        return self.trunk_bytes + sum(self.layer_bytes)

    @property
    def expert_bits(self) -> float:
        """Bits per weight of the experts."""
        return 8 * self.expert_bytes / self.expert_weights

    @property
    def attention_bits(self) -> float:
        """Bits per weight of the attention projections."""
        return 8 * self.attention_bytes / max(1, self.attention_weights)

    def memory_bytes(self, workers: int, solver: Solver) -> int:
        """Return an estimate of peak anonymous memory with `workers` workers."""
        calibration, calibration_per_worker = self.calibration_bytes
        solved = solver.bytes_a_weight * CHUNK_WEIGHTS
        per_worker = calibration_per_worker + solved + self.largest_expert_bytes
        base = _BASE_MEMORY_BYTES
        if self.adapter_bytes:
            base += _PEFT_BYTES + self.adapter_bytes
            per_worker += 2 * 4 * MERGED_AT_ONCE
        return base + calibration + workers * per_worker


def plan_output(checkpoint: Sized, recipe: ConversionRecipe) -> OutputPlan:
    """Return the plan for `checkpoint` by `recipe`.

    For a recipe whose bit rules are not chosen yet, it assumes likely ones. RecipeError if the
    recipe packs a head that is the embedding.
    """
    shape = checkpoint.shape
    a = shape.architecture
    stored = {UNPACKED: plain_packing_for(checkpoint.expert_dtypes)}
    layouts = [
        [
            ExpertLayout.from_names(
                a, stored.get(gate_up, gate_up), stored.get(down, down), "recipe"
            )
            for gate_up, down in layer
        ]
        for layer in packings_by_expert(likely_bits(recipe, a), a)
    ]
    linears = {module: size for module, size in shape.linears.items() if module != HEAD}
    packed: dict[str, PackedLinear] = {}
    if recipe.attention != UNPACKED:
        packed = {
            module: PackedLinear(recipe.attention, rows, columns)
            for module, (rows, columns) in linears.items()
        }
    if recipe.head != UNPACKED:
        if a.tie_word_embeddings:
            raise RecipeError(
                "the head is the embedding (tie_word_embeddings) and cannot have bits of its own",
                "use --head-bits 16",
            )
        packed[HEAD] = PackedLinear(recipe.head, *shape.linears[HEAD])
    entries = _trunk_entries(checkpoint, packed)
    attention = [e for e in entries if e.name.rsplit(".", 1)[0] in linears]
    # Headers are padded to 4096; the exact sizes come from the writers.
    return OutputPlan(
        layouts=layouts,
        shape=shape,
        trunk_entries=entries,
        packed=packed,
        expert_weights=sum(layout.n_weights for layer in layouts for layout in layer),
        attention_weights=sum(rows * columns for rows, columns in linears.values()),
        attention_bytes=sum(e.n_bytes for e in attention),
        trunk_bytes=entries[-1].end,
        layer_bytes=[
            raw_entries(module.path, layer)[-1].end
            for module, layer in zip(shape.experts, layouts, strict=True)
        ],
        calibration_bytes=calibration_memory_bytes(
            a, recipe.options.calibration_tokens, recipe.options.down_block(a.intermediate_size)
        ),
        adapter_bytes=checkpoint.adapter_bytes,
    )


def check_disk(plan: OutputPlan, out: Path, codec: str, fetch_bytes: int = 0) -> int:
    """Return the free bytes of the disk of `out`; DoesNotFitError if the conversion needs more.

    fetch_bytes: disk that fetched shards may take until the conversion is complete.
    """
    needed_bytes = plan.total_bytes + _SMALL_FILES_BYTES
    if not (out / INDEX_NAME).exists():
        needed_bytes += fetch_bytes
    if codec == "zstd":
        # Beside a layer's raw file: its compressed frames, and the file assembled from them.
        needed_bytes += 2 * max(plan.layer_bytes)
    free_bytes = free_disk_bytes(out)
    with translated(out, "used"):
        needed_bytes -= _written_bytes(plan, out)
    if needed_bytes > free_bytes:
        hint = "free some space, or choose another disk"
        if fetch_bytes:
            hint += "; or lower --max-disk, or add --no-keep"
        raise DoesNotFitError(
            f"{out}: the conversion needs {needed_bytes} bytes more, free are {free_bytes}", hint
        )
    return free_bytes


def chunk_rows(columns: int) -> int:
    """Return the number of rows that a worker solves at once, a multiple of 32."""
    return max(32, CHUNK_WEIGHTS // columns // 32 * 32)


def _is_quantized(layout: ExpertLayout) -> bool:
    return layout.gate_up.name in PACKINGS or layout.down.name in PACKINGS


def _written_bytes(plan: OutputPlan, out: Path) -> int:
    """Return the disk that trunk and layer files in `out` take, complete and partial ones."""
    layer_names = [layer_file_name(layer) for layer in range(len(plan.layer_bytes))]
    complete = [out / name for name in (TRUNK_NAME, *layer_names)]
    files = [*complete, *map(partial_path, complete)]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def _trunk_entries(checkpoint: Sized, packed: dict[str, PackedLinear]) -> list[TensorEntry]:
    """Return the trunk's entries: packed matrices, then other tensors by dtype size and name.

    Sizes of packed matrices are multiples of 128, so every tensor is aligned to its dtype.
    """
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
    for module, linear in packed.items():
        packing = tile_packing_named(linear.packing)
        shapes.append(
            (f"{module}.packed", packing.dtype, packing.stored_shape(linear.rows, linear.columns))
        )
    rest = [
        (name, weight.dtype, weight.shape)
        for name, weight in checkpoint.trunk.items()
        if name.removesuffix(".weight") not in packed
    ]
    shapes += sorted(rest, key=lambda t: (-DTYPE_BYTES[t[1]], t[0]))
    entries: list[TensorEntry] = []
    for name, dtype, shape in shapes:
        begin = entries[-1].end if entries else 0
        entries.append(
            TensorEntry(name, dtype, shape, begin, begin + prod(shape) * DTYPE_BYTES[dtype])
        )
    return entries
