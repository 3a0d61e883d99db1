"""The output's files that come from the source and hold no weights: config.json, copied files."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from converter.checkpoint.adapters.adapter_folder import is_tokenizer_file
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
from formats.files.partial_file import write_file
from formats.files.paths import locate_source, read_small_source
from formats.index import CopiedFile, Recipe

_log = logging.getLogger(__name__)


def write_config(config: dict[str, Any], recipe: Recipe, out: Path) -> CopiedFile:
    """Write config.json: the source's fields that may reach transformers, and one of ours.

    config: the gated fields. Transformers finds the loader's plugin by quantization_config.
    """
    quantization = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": recipe.name,
    }
    fields = {**config, "quantization_config": quantization}
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    return _write(out, CONFIG_NAME, text.encode())


def side_files_of(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the name of each side file of the output, and the folder that it is copied from.

    An adapter's tokenizer and chat templates replace all of the checkpoint's. Raises the errors of
    `check_side_files`.
    """
    files = dict.fromkeys(check_side_files(checkpoint.folder), checkpoint.folder)
    folder = checkpoint.tokenizer_folder
    if folder == checkpoint.folder:
        return files
    kept = {name: place for name, place in files.items() if not is_tokenizer_file(name)}
    return kept | dict.fromkeys(filter(is_tokenizer_file, check_side_files(folder)), folder)


def check_side_files(source: Path) -> list[str]:
    """Return the names of the files in folder `source` that `copy_files` copies.

    SourceError for a file that transformers would read and that cannot be copied; other such files
    are left out with a warning.
    """
    names = []
    try:
        candidates = list(names_beside_weights(source))
    except OSError as e:
        raise SourceError(
            f"{e.filename}: cannot be read: {e.strerror}", "make the folder readable"
        ) from None
    for name in candidates:
        if name == TEMPLATES_FOLDER:
            # A file of this name makes transformers silently read the default template alone.
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
            f"{source}: {len(names)} files beside the weights, the limit is {MAX_FILES - 1}",
            "remove some",
        )
    return names


def copy_files(files: dict[str, Path], out: Path) -> list[CopiedFile]:
    """Copy side files (name -> folder): tokenizer, chat templates, generation config, licence."""
    return [_write(out, name, copied_bytes(folder, name)) for name, folder in sorted(files.items())]


def copied_bytes(source: Path, name: str) -> bytes:
    """Return the bytes of a side file as the output has them.

    generation_config.json loses the fields that transformers must not get.
    """
    data = read_small_source(source, name, str(source), max_bytes=MAX_BYTES)
    if name == GENERATION_NAME:
        return clean_generation_config(data, str(source / name), error=SourceError)
    return data


def _write(out: Path, name: str, data: bytes) -> CopiedFile:
    path = out / name
    if path.parent != out:
        make_folder(path.parent)
    write_file(path, data)
    return CopiedFile(name, len(data), hashlib.sha256(data).hexdigest())
