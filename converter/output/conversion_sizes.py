"""What a conversion will write, known before the first weight is read: layouts, sizes, memory,
disk.
"""

import os
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

from converter.calibration.pass_memory import calibration_memory_bytes
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
from formats.files.io_errors import translated
from formats.index import PackedLinear
from formats.layer_file import layer_file_name, partial_path, raw_entries
from formats.packing import PACKINGS, tile_packing_named
from formats.safetensors_header import DTYPE_BYTES, TensorEntry
from formats.trunk import trunk_metadata

CHUNK_WEIGHTS = 4 << 20
"""Weights that a worker solves at once. It decides where the hqq package stops iterating, and so
the bytes.
"""

_BASE_MEMORY_BYTES = 300 << 20
"""Measured: the process after its imports, generously."""

_SMALL_FILES_BYTES = 16 << 20
"""Tokenizer, index, quality.json and so on, generously."""


class Sized(Protocol):
    """A `Checkpoint`, or an `Outline` of one."""

    @property
    def shape(self) -> ModelShape:
        """What the model is made of."""

    @property
    def trunk(self) -> dict[str, Weight]:
        """Every tensor that is not an expert."""

    @property
    def expert_dtypes(self) -> set[str]:
        """In what the experts are stored, as safetensors calls it."""


@dataclass(frozen=True)
class OutputPlan:
    """Sizes in bytes of everything that a conversion of one checkpoint by one recipe writes."""

    layouts: list[list[ExpertLayout]]
    """layouts[layer][expert]: of the layers that have experts."""
    shape: ModelShape
    trunk_entries: list[TensorEntry]
    packed: dict[str, PackedLinear]
    expert_weights: int
    attention_weights: int
    attention_bytes: int
    trunk_bytes: int
    layer_bytes: list[int]

    @property
    def packings(self) -> list[str]:
        """All that entries of the index use, ascending, each once."""
        used = {
            p.name
            for layer in self.layouts
            for layout in layer
            for p in (layout.gate_up, layout.down)
        }
        return sorted(used | {linear.packing for linear in self.packed.values()})

    @property
    def trunk_metadata(self) -> dict[str, str]:
        """Of the trunk's header."""
        return trunk_metadata(self.shape.architecture, self.packed)

    @property
    def last_quantized_layer(self) -> int:
        """The last decoder layer of which something is quantized, their number if the head is; -1
        if nothing is.
        """
        n = len(self.shape.decoder_layers)
        return n if HEAD in self.packed else max(filter(self.quantizes, range(n)), default=-1)

    def quantizes(self, layer: int) -> bool:
        """Whether something of a decoder layer is quantized."""
        sites = zip(self.shape.experts, self.layouts, strict=True)
        layouts = [
            layout for site, of_layer in sites if site.decoder_layer == layer for layout in of_layer
        ]
        experts = (p.name in PACKINGS for layout in layouts for p in (layout.gate_up, layout.down))
        return any(experts) or any(
            self.shape.decoder_layer(module) == layer for module in self.packed
        )

    @property
    def expert_bytes(self) -> int:
        """Of all experts, without fillers and headers."""
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

    calibration_bytes: tuple[int, int]
    """Of the calibration, and of each worker for it."""

    def memory_bytes(self, workers: int, solver: Solver) -> int:
        """Peak anonymous memory with `workers` workers, estimated."""
        whole, each = self.calibration_bytes
        return (
            _BASE_MEMORY_BYTES
            + whole
            + workers * (each + solver.bytes_a_weight * CHUNK_WEIGHTS + self.largest_expert_bytes)
        )


def plan_output(checkpoint: Sized, recipe: ConversionRecipe) -> OutputPlan:
    """The plan for `checkpoint` by `recipe`; where its rules of bits are not chosen yet, for likely
    ones.
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
                "the head is the embedding (tie_word_embeddings) and cannot have bits of its own"
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
            raw_entries(site.path, layer)[-1].end
            for site, layer in zip(shape.experts, layouts, strict=True)
        ],
        calibration_bytes=calibration_memory_bytes(
            a, recipe.options.calibration_tokens, recipe.options.down_block(a.intermediate_size)
        ),
    )


def check_disk(plan: OutputPlan, out: Path, codec: str, fetch_bytes: int = 0) -> int:
    """The free bytes of the disk of `out`. DoesNotFitError, with both numbers, if what is still to
    be written is more.

    fetch_bytes: what shards may take that are fetched for the conversion, unless it is complete.
    """
    parent = next(p for p in (out, *out.absolute().parents) if os.path.exists(p))
    written = (
        out / name
        for name in (TRUNK_NAME, *(layer_file_name(n) for n in range(len(plan.layer_bytes))))
    )
    files = [path for file in written for path in (file, partial_path(file))]
    with translated(out, "used"):
        free = shutil.disk_usage(parent).free
        present = sum(f.stat().st_blocks * 512 for f in files if f.is_file())
    needed = (
        plan.total_bytes + _SMALL_FILES_BYTES + (0 if (out / INDEX_NAME).exists() else fetch_bytes)
    )
    if codec == "zstd":
        needed += 2 * max(plan.layer_bytes)
    if needed - present > free:
        raise DoesNotFitError(
            f"{out}: the conversion needs {needed - present} bytes more, free are {free}",
            "free some space, or choose another disk"
            + ("; or lower --max-disk, or add --no-keep" if fetch_bytes else ""),
        )
    return free


def chunk_rows(columns: int) -> int:
    """Rows that a worker solves at once: a multiple of 32."""
    return max(32, CHUNK_WEIGHTS // columns // 32 * 32)


def _trunk_entries(checkpoint: Sized, packed: dict[str, PackedLinear]) -> list[TensorEntry]:
    """Packed matrices first, whose sizes are multiples of 128, then everything else, by dtype size
    and name.
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
