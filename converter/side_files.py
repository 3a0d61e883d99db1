"""Everything in the output that is the source's and holds no weights: config.json, copied files."""

import hashlib
import json
from pathlib import Path

from converter.source import Checkpoint
from converter.source_files import COPIED
from formats import FORMAT_VERSION
from formats.errors import SourceError
from formats.index import CopiedFile, Recipe
from formats.io_errors import translated
from formats.paths import locate
from formats.writer import write_file


def write_config(checkpoint: Checkpoint, recipe: Recipe, out: Path) -> CopiedFile:
    """The source's config.json with the quantization_config by which transformers finds the loader's plugin."""
    quantization = {
        "quant_method": "moe_convert",
        "format_version": FORMAT_VERSION,
        "recipe": recipe.name,
    }
    config = {**checkpoint.config, "quantization_config": quantization}
    return _write(out, "config.json", json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")


def copy_files(source: Path, out: Path) -> list[CopiedFile]:
    """Copies tokenizer, generation config, chat template and licence byte for byte."""
    return [_write(out, name, _read(source, name)) for name in copied_names(source)]


def copied_names(source: Path) -> list[str]:
    """The files that `copy_files` copies, relative to the source."""
    return sorted({p.name for pattern in COPIED for p in source.glob(pattern) if not p.is_dir()})


def _read(source: Path, name: str) -> bytes:
    with translated(source / name, "read", SourceError):
        return locate(source, name, str(source)).read_bytes()


def _write(out: Path, name: str, data: bytes) -> CopiedFile:
    write_file(out / name, data)
    return CopiedFile(name, len(data), hashlib.sha256(data).hexdigest())
