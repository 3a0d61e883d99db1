"""Small models whose columns fit superblocks, and the tensors of their GGUF files."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from project_paths import EXAMPLE
from random_models import write_checkpoint

import loader
from converter.convert import convert_checkpoint
from converter.gguf.gguf_file import plan_export, write_gguf
from converter.gguf.options import ExportOptions
from converter.recipe.recipes import make_recipe
from formats.artifact import Artifact
from formats.progress import Progress, no_progress
from formats.reading.mmap_reader import MmapReader

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
"""Columns are multiples of 256, heads have 32 dimensions."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_wide_source(folder: Path, **fields: Any) -> Path:
    """A checkpoint with the example's tokenizer; `fields` of its configuration."""
    fields = {**SIZES, "vocab_size": 4096, "num_hidden_layers": 2, "num_local_experts": 4} | fields
    write_checkpoint(folder, "mixtral", fused=False, **fields)
    for name in _TOKENIZER:
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


def convert_wide(source: Path, folder: Path, recipe: str = "2bit", **options: Any) -> Path:
    """The source converted without calibration; `options` of `make_recipe`."""
    if recipe != "16bit":
        options = {"solver": "hqq", **options}
    convert_checkpoint(source, folder, make_recipe(recipe, **options))
    return folder


def export_folder(
    folder: Path, out: Path, progress: Progress = no_progress, **options: Any
) -> Path:
    """The folder's GGUF file, written to `out`; `options` of ExportOptions."""
    artifact = Artifact.open(folder)
    plan = plan_export(artifact, loader.load_tokenizer(folder), ExportOptions(**options))
    with MmapReader(artifact) as reader:
        write_gguf(plan, reader, out, progress)
    return out


def tensors_of(file: Path) -> dict[str, tuple[str, Any]]:
    """Name -> (type, weights) as the package gguf reads them."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]),
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def fields_of(file: Path) -> dict[str, Any]:
    """All metadata of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def largest_difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())
