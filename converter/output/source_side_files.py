"""Everything in the output that is the source's and holds no weights: config.json, copied files."""

import hashlib
import json
import logging
from pathlib import Path

from converter.checkpoint.source import Checkpoint
from formats import FORMAT_VERSION
from formats.config.generation_config import GENERATION_NAME, clean_generation_config
from formats.config.recorded_config import CONFIG_NAME, METHOD
from formats.config.side_files import (
    MAX_BYTES,
    MAX_FILES,
    TEMPLATES_FOLDER,
    is_read_by_transformers,
    is_side_file,
    names_beside_weights,
    resembles_side_file,
    unusable,
)
from formats.errors import SourceError
from formats.files.output_file import make_folder
from formats.files.paths import locate_source, read_small_source
from formats.index import CopiedFile, Recipe
from formats.writer import write_file

_log = logging.getLogger(__name__)


def write_config(checkpoint: Checkpoint, recipe: Recipe, out: Path) -> CopiedFile:
    """config.json: the source's fields that may reach transformers, and the quantization_config by
    which it finds the loader's plugin.
    """
    quantization = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": recipe.name,
    }
    config = {**checkpoint.config, "quantization_config": quantization}
    return _write(
        out, CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    )


def check_side_files(source: Path) -> list[str]:
    """The names of the files in folder `source` that `copy_files` copies.

    SourceError for one that transformers would read and that cannot be copied; others are left out
    with a warning.
    """
    names = []
    try:
        found = list(names_beside_weights(source))
    except OSError as e:
        raise SourceError(
            f"{e.filename}: cannot be read: {e.strerror}", "make the folder readable"
        ) from None
    for name in found:
        if name == TEMPLATES_FOLDER:
            # With this name in the way, transformers would read the default template alone, without
            # a word.
            raise SourceError(
                f"{source / name}: is not a folder",
                "get the folder of chat templates, or remove it",
            )
        if resembles_side_file(name):
            _log.warning(
                "%s is left out: neither transformers nor a licence has a file of that name",
                source / name,
            )
        elif not is_side_file(name):
            continue
        elif not (problem := unusable(source / name)):
            names.append(name)
            locate_source(source, name, str(source))
        elif is_read_by_transformers(name):
            raise SourceError(f"{source / name}: {problem[0]}", problem[1])
        else:
            _log.warning("%s is left out: it %s", source / name, problem[0])
    if len(names) >= MAX_FILES:
        raise SourceError(
            f"{source}: {len(names)} files beside the weights, allowed are {MAX_FILES - 1}",
            "remove some",
        )
    return names


def copy_files(source: Path, names: list[str], out: Path) -> list[CopiedFile]:
    """Copies the files `names`: tokenizer, chat templates, generation config, licence and the like
    (`copied_bytes`).
    """
    return [_write(out, name, copied_bytes(source, name)) for name in sorted(names)]


def copied_bytes(source: Path, name: str) -> bytes:
    """A file of the source as the output has it: generation_config.json without what transformers
    must not get.
    """
    data = read_small_source(source, name, str(source), max_bytes=MAX_BYTES)
    return (
        clean_generation_config(data, str(source / name), error=SourceError)
        if name == GENERATION_NAME
        else data
    )


def _write(out: Path, name: str, data: bytes) -> CopiedFile:
    path = out / name
    if path.parent != out:
        make_folder(path.parent)
    write_file(path, data)
    return CopiedFile(name, len(data), hashlib.sha256(data).hexdigest())
