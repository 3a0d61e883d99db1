"""Write a converted folder of random packed weights, of any shape and recipe. No source is needed.

    python bench/make_folder.py /tmp/8x7b --shape mixtral-8x7b --recipe 2bit
    python bench/make_folder.py /tmp/8x7b-4 --layers 4 --vocab 4096

The folder verifies, loads and generates random text. The same arguments and numpy version give the
same bytes. Memory stays under 2 GB; the disk decides the time (8x7B at 2bit: 15.4 GB).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_shapes import SHAPES, SIZE_NAMES, shape_config, write_model_files
from msgspec.structs import replace
from numpy.random import Generator
from random_matrices import ExpertPool, MatrixPool, generator_for

from converter import __version__
from converter.checkpoint.outline import Outline
from converter.conversion.index_assembly import layer_part, trunk_part
from converter.journal.records import LayerRecord
from converter.output.conversion_sizes import check_disk, plan_output
from converter.output.source_side_files import check_side_files, copy_files, write_config
from converter.recipe.bit_budget import likely_bits
from converter.recipe.conversion_recipe import ConversionRecipe
from converter.recipe.recipe_file import recipe_settings
from converter.recipe.recipe_options import RecipeOptions
from converter.recipe.recipes import DEFAULT_RECIPE, RECIPES, make_recipe
from formats import EXPERTS_FOLDER, FORMAT_VERSION, INDEX_NAME, TRUNK_NAME
from formats.config.checkpoint_config import read_config
from formats.errors import MoeConvertError, OutputError
from formats.expert import ExpertLayout
from formats.files.output_file import fsync_folder, make_folder, make_folders
from formats.files.partial_file import write_file
from formats.index import Index, LayerFile, Producer, Source, Trunk, dump_index
from formats.layer_file import layer_file_name
from formats.packing import tile_packing_named
from formats.safetensors_header import TensorEntry
from formats.writer import LayerWriter, Place, PlacedFile

CHUNK_WEIGHTS = 8 << 20
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Done = Callable[[int], None]
"""Called with the number of bytes written."""


def make_random_folder(
    out: Path,
    config: dict[str, Any],
    recipe: str = DEFAULT_RECIPE,
    *,
    seed: int = 0,
    skew: float = 0.0,
    done: Done = lambda n_bytes: None,
) -> None:
    """Write the folder `out`, which is empty or does not exist; on an error it is removed.

    config: fields of config.json, from `shape_config`. recipe: a name, or a JSON file as `convert
    --recipe` takes it. skew: standard deviation of the logarithm of a router row's length; 0 gives
    each expert about the same number of tokens. Raises OutputError, RecipeError, SourceError,
    DoesNotFitError.
    """
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty", f"choose another folder, or rm -r {out}")
    with tempfile.TemporaryDirectory() as source:
        write_model_files(Path(source), config)
        made = _RandomFolder(Path(source), out, recipe, seed, skew, done)
        make_folders(out)
        try:
            made.write()
        except BaseException:
            shutil.rmtree(out)
            raise


def kept_folder(work: Path, layers: int, **sizes: int) -> Path:
    """Return a folder in `work` with 8x7B's layers at 2bit; make it if it does not exist.

    The vocabulary is 4096: with few layers, a real head would take most of a token's time. 4 layers
    have 2 GB. sizes: others than 8x7B's, for tests.
    """
    folder = work / f"8x7b-{layers}-2bit"
    if not (folder / INDEX_NAME).exists():
        print(f"making {folder}", file=sys.stderr, flush=True)
        config = shape_config("mixtral-8x7b", layers=layers, vocab=4096, **sizes)
        make_random_folder(folder, config)
    return folder


class _RandomFolder:
    """A folder to write. source: has config.json and tokenizer."""

    def __init__(
        self, source: Path, out: Path, recipe: str, seed: int, skew: float, done: Done
    ) -> None:
        self._source, self._out, self._seed, self._skew, self._done = source, out, seed, skew, done
        outline = Outline.of_folder(source)
        self._architecture = outline.architecture
        self._recipe = _random_recipe(recipe, outline)
        self._plan = plan_output(outline, self._recipe)
        check_disk(self._plan, out, "none")
        self._experts = {
            layout: ExpertPool(layout, generator_for(seed, repr(layout)))
            for layout in {layout for layer in self._plan.layouts for layout in layer}
        }

    def write(self) -> None:
        """Write all files, the index last."""
        make_folder(self._out / EXPERTS_FOLDER)
        # Hashing and writing leave Python's lock, so each core takes a layer.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            layers = list(pool.map(self._layer, range(len(self._plan.layouts))))
        index = Index(
            format="moe-convert",
            format_version=FORMAT_VERSION,
            producer=Producer("moe-convert", __version__, {"numpy": np.__version__}),
            source=Source("random", None, []),
            config=read_config(self._source),
            architecture=self._architecture,
            recipe=self._recipe.recorded,
            packings=self._plan.packings,
            trunk=self._trunk(),
            layers=layers,
            files=[
                write_config(read_config(self._source), self._recipe.recorded, self._out),
                *copy_files(dict.fromkeys(check_side_files(self._source), self._source), self._out),
            ],
        )
        fsync_folder(self._out / EXPERTS_FOLDER)
        write_file(self._out / INDEX_NAME, dump_index(index))

    def _layer(self, layer: int) -> LayerFile:
        path, layouts = self._out / layer_file_name(layer), self._plan.layouts[layer]
        places = []
        with LayerWriter(path, layer, self._plan.shape.experts[layer].path, layouts) as writer:
            for expert, layout in enumerate(layouts):
                data = self._expert(layer, expert, layout)
                checksums = writer.write_expert(expert, data)
                places.append(Place(writer.offsets[expert], layout.n_bytes, *checksums))
                self._done(layout.n_bytes)
            writer.finish()
        header_sha256 = hashlib.sha256(writer.header).hexdigest()
        record = LayerRecord(layer, writer.size_bytes, header_sha256, places)
        return layer_part(record, layouts, "none")

    def _expert(self, layer: int, expert: int, layout: ExpertLayout) -> torch.Tensor:
        return self._experts[layout].draw(generator_for(self._seed, f"{layer}.{expert}"))

    def _trunk(self) -> Trunk:
        plan = self._plan
        # All layers' matrices of one shape come from one pool: packing is slower than copying.
        pools = {
            linear: MatrixPool(
                tile_packing_named(linear.packing),
                linear.rows,
                linear.columns,
                generator_for(self._seed, repr(linear)),
            )
            for linear in set(plan.packed.values())
        }
        with PlacedFile(self._out / TRUNK_NAME, plan.trunk_entries, plan.trunk_metadata) as file:
            for entry in plan.trunk_entries:
                generator = generator_for(self._seed, entry.name)
                if linear := plan.packed.get(entry.name.removesuffix(".packed")):
                    stored = torch.empty(entry.shape, dtype=torch.uint8)
                    pools[linear].fill(stored, generator)
                    file.write(entry.name, stored)
                else:
                    self._write_tensor(file, entry, generator)
                self._done(entry.n_bytes)
            file.finish()
        return trunk_part(plan, file)

    def _write_tensor(self, file: PlacedFile, entry: TensorEntry, generator: Generator) -> None:
        """Write normally distributed values, or ones for a vector: it scales a norm's output."""
        rows, *rest = entry.shape
        columns = rest[0] if rest else 1
        lengths = self._row_lengths(entry, generator)
        position = 0
        step = max(1, CHUNK_WEIGHTS // columns)
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            values = np.ones((count, 1), np.float32)
            if rest:
                values = generator.standard_normal((count, columns), dtype=np.float32)
                values *= lengths[begin : begin + count, None] / np.sqrt(columns)
            stored = torch.from_numpy(values).to(TORCH_DTYPES[entry.dtype]).view(torch.uint8)
            file.write(entry.name, stored, position)
            position += stored.numel()

    def _row_lengths(self, entry: TensorEntry, generator: Generator) -> Any:
        """Return the expected length of each row, float32 [rows]."""
        rows = entry.shape[0]
        shape = self._plan.shape
        if entry.name == shape.embedding:
            return np.full(rows, np.sqrt(entry.shape[1]), np.float32)
        routers = {f"{module.path.rpartition('.')[0]}.gate.weight" for module in shape.experts}
        if entry.name in routers and self._skew:
            return np.exp(generator.normal(0, self._skew, rows)).astype(np.float32)
        return np.ones(rows, np.float32)


def _random_recipe(recipe: str, outline: Outline) -> ConversionRecipe:
    """Return the recipe's packings; the solver is `random`, without calibration."""
    chosen = likely_bits(make_recipe(**recipe_settings(recipe)), outline.architecture)
    return replace(chosen, solver="random", options=RecipeOptions(rules=chosen.options.rules))


def main() -> None:
    """Write the folder, with its progress on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        help=f"{', '.join(RECIPES)}, or a JSON file (default: {DEFAULT_RECIPE})",
    )
    for name in SIZE_NAMES:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, metavar="N", help="default: the shape's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skew",
        type=float,
        default=0.0,
        help="spread of the routers' row lengths: 0 uses all experts alike (default: 0)",
    )
    options = parser.parse_args()
    written_bytes, begin_s = 0, time.perf_counter()

    def done(n_bytes: int) -> None:
        nonlocal written_bytes
        written_bytes += n_bytes
        seconds = time.perf_counter() - begin_s
        rate = written_bytes / seconds / 1e9
        text = f"\r{written_bytes / 1e9:.2f} GB in {seconds:.0f} s, {rate:.2f} GB/s"
        print(text, end="", file=sys.stderr, flush=True)

    try:
        sizes = {name: getattr(options, name) for name in SIZE_NAMES}
        make_random_folder(
            options.folder,
            shape_config(options.shape, **sizes),
            options.recipe,
            seed=options.seed,
            skew=options.skew,
            done=done,
        )
    except MoeConvertError as e:
        sys.exit(f"error: {e.message}" + (f"\n  next: {e.hint}" if e.hint else ""))
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
