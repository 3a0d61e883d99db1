"""Side files: files of tokenizers, processors and generation beside the weights, and licences.

The converter copies only these. From a converted folder, transformers gets only those listed in the
index. Code (custom_generate, tokenization_*.py), adapters and other weights are never among them.
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
"""The largest published tokenizer.json that we know of has 34 MB."""
MAX_FILES = 1000
"""Limit on the side files of a model, config.json included."""

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.[0-9]*.json",
    "*.model",
    "tokenizer.model.v[0-9]*",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
)
"""Patterns of vocabulary files.

They are VOCAB_FILES_NAMES of transformers' tokenizers, and the files that transformers reads if
tokenizer.json is missing.
"""
READ_BY_TRANSFORMERS = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    f"{TEMPLATES_FOLDER}/*.jinja",
)
OPTIONAL = (
    # Useless to a text model, but AutoProcessor may read them.
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)

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
    """True if the converter copies a file of this name, relative to the model's folder."""
    return is_read_by_transformers(name) or _matches(name, OPTIONAL)


def is_read_by_transformers(name: str) -> bool:
    """True if a missing file `name` can change tokens or chats."""
    return _matches(name, READ_BY_TRANSFORMERS)


def resembles_side_file(name: str) -> bool:
    """True for a renamed copy of a side file, such as "tokenizer.json~" or "vocab (1).json"."""
    if is_side_file(name):
        return False
    if name.startswith(f"{TEMPLATES_FOLDER}/"):
        return True
    stem = _STEM.match(name.rpartition("/")[2])
    return stem is not None and stem[1].lower() in _STEMS


def names_beside_weights(folder: Path) -> Iterator[str]:
    """List the entries of `folder`, and those of its folder of chat templates.

    Raises OSError if a folder cannot be read.
    """
    for entry in sorted(os.listdir(folder)):
        if entry == TEMPLATES_FOLDER and (folder / entry).is_dir():
            yield from (f"{entry}/{name}" for name in sorted(os.listdir(folder / entry)))
        else:
            yield entry


def unusable(path: Path) -> tuple[str, str] | None:
    """Return (problem, next step) for a file that cannot be used; None for a good one.

    Refuses anything but a readable regular file of at most `MAX_BYTES`, and pointers of git-lfs.
    """
    if os.path.islink(path) and not os.path.exists(path):
        return (
            f"is a link to {os.path.realpath(path)}, which does not exist",
            "get the file, or remove the link",
        )
    if os.path.isdir(path):
        return "is a folder", "get the file, or remove the folder"
    try:
        with translated(path, "read", PathError), os.fdopen(open_regular(path), "rb") as file:
            begin = file.read(len(LFS_POINTER))
            size_bytes = os.fstat(file.fileno()).st_size
    except PathError as e:
        return e.message.removeprefix(f"{path}").lstrip(": "), e.hint
    if problem := lfs_problem(begin, path):
        return problem
    if size_bytes > MAX_BYTES:
        return (
            f"has {size_bytes} bytes, the limit is {MAX_BYTES}",
            "get the file again, or remove it",
        )
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
