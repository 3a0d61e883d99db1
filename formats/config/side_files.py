"""The small files beside the weights that transformers' tokenizers, processors and generation read,
and licences.

Only these are copied from a checkpoint, and of a converted folder transformers gets only these, if
the index lists
them: never code (custom_generate, tokenization_*.py), adapters or other weights.
"""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from formats.errors import PathError
from formats.files.io_errors import translated
from formats.files.paths import LFS_POINTER, check_name, lfs_problem, open_regular

TEMPLATES_FOLDER = "additional_chat_templates"
MAX_BYTES = 256 << 20
"""The largest tokenizer.json that we know has 34 MB."""
MAX_FILES = 1000
"""Of a model, config.json included."""

VOCABULARIES = (
    "tokenizer.json", "tokenizer.[0-9]*.json", "*.model", "tokenizer.model.v[0-9]*", "tekken.json", "vocab.json",
    "vocab.txt", "merges.txt", "bpe.codes",
)  # fmt: skip
"""Patterns of the files that hold a vocabulary: VOCAB_FILES_NAMES of transformers' tokenizers, and
what is read in the place of a missing tokenizer.json.
"""
READ_BY_TRANSFORMERS = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", f"{TEMPLATES_FOLDER}/*.jinja",
)  # fmt: skip
OPTIONAL = (
    # A text model has no use for a processor's files, but AutoProcessor may.
    "chat_template.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip

_BACKUP = re.compile(
    r".*(~|\.(bak|backup|old|orig|save|rej|tmp|swp|part|partial|crdownload|download)\d*)", re.I
)
_STEM = re.compile(r"[^A-Za-z]*([A-Za-z_]+)")
_STEMS = {"tokenizer", "vocab", "merges", "tekken"} | {
    match[1].lower()
    for pattern in (*READ_BY_TRANSFORMERS, *OPTIONAL)
    if (match := re.match("([A-Za-z_]+)", pattern))
}


def is_side_file(name: str) -> bool:
    """True if a file of that name, relative to the model's folder, is copied."""
    return is_read_by_transformers(name) or _matches(name, OPTIONAL)


def is_read_by_transformers(name: str) -> bool:
    """True if tokens or chats can differ where the file `name` is missing."""
    return _matches(name, READ_BY_TRANSFORMERS)


def resembles_side_file(name: str) -> bool:
    """True for a copy that an editor, a browser or a person made, such as "tokenizer.json~", "vocab
    (1).json".
    """
    stem = _STEM.match(name.rpartition("/")[2])
    return not is_side_file(name) and (
        name.startswith(f"{TEMPLATES_FOLDER}/") or bool(stem and stem[1].lower() in _STEMS)
    )


def names_beside_weights(folder: Path) -> Iterator[str]:
    """The names in `folder` that can be side files: its entries, and those of the folder of chat
    templates. OSError.
    """
    for entry in sorted(os.listdir(folder)):
        if entry == TEMPLATES_FOLDER and (folder / entry).is_dir():
            yield from (f"{entry}/{name}" for name in sorted(os.listdir(folder / entry)))
        else:
            yield entry


def unusable(path: Path) -> tuple[str, str] | None:
    """(what is wrong, next step) with a file that is no readable regular file of a sane size, or
    that git-lfs has not fetched; None for a good one.
    """
    if os.path.islink(path) and not os.path.exists(path):
        return (
            f"is a link to {os.path.realpath(path)}, which is not there",
            "get the file, or remove the link",
        )
    if os.path.isdir(path):
        return "is a folder", "get the file, or remove the folder"
    try:
        with translated(path, "read", PathError), os.fdopen(open_regular(path), "rb") as file:
            begin, size = file.read(len(LFS_POINTER)), os.fstat(file.fileno()).st_size
    except PathError as e:
        return e.message.removeprefix(f"{path}").lstrip(": "), e.hint
    if problem := lfs_problem(begin, path):
        return problem
    if size > MAX_BYTES:
        return f"has {size} bytes, allowed are {MAX_BYTES}", "get the file again, or remove it"
    return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    try:
        check_name(name, "")
    except PathError:
        return False
    if _BACKUP.fullmatch(name):
        return False
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )
