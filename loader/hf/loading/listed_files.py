"""Hides files from transformers that the index does not list.

Such files (an adapter, a chat template, other weights) are not verified.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from formats import INDEX_NAME
from formats.config.side_files import is_read_by_transformers, names_beside_weights
from formats.files.log_once import warn_once
from formats.files.paths import locate
from formats.index import Index

_ADAPTERS = {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}


@contextmanager
def link_listed_files(folder: Path, index: Index, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a temporary folder with links to the listed files whose name satisfies `wanted`.

    Logs a warning, once a process, for each unlisted file that transformers would read. Raises
    PathError for an unsafe file name, and DamageError for a missing file.
    """
    listed = {file.file for file in index.files} | {index.trunk.file}
    _warn_of_unlisted(folder, listed)
    with tempfile.TemporaryDirectory(prefix="moe-convert-") as temporary:
        view = Path(temporary)
        for name in sorted(filter(wanted, listed)):
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(locate(folder, name, str(folder)), view / name)
        yield view


def _warn_of_unlisted(folder: Path, listed: set[str]) -> None:
    for name in names_beside_weights(folder):
        if name not in listed and (name in _ADAPTERS or is_read_by_transformers(name)):
            warn_once(f"{folder / name} is not used: {INDEX_NAME} does not list it")
